"""Tests of the fingerprint by which an index knows its model, also one of an earlier version."""

import copy
import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from indexes import model

import xclip_jax
from xclip_jax.search import indexing

__all__ = ["model"]  # the fixture


def test_fingerprint_of_a_model_is_that_of_earlier_versions(model):
    """Compares with the model.json of a version that had fewer fields."""
    retriever = xclip_jax.load(model)
    former = copy.deepcopy(retriever.config)
    sizes = {"width", "layers", "heads"}
    former["vision"] = {k: former["vision"][k] for k in sizes | {"image_size", "patch_size"}}
    former["text"] = {k: former["text"][k] for k in sizes | {"vocab_size", "context_length"}}
    del former["towers"], former["max_scale"], former["preprocess"]["spread"]
    digest = hashlib.blake2b(digest_size=8)
    ignored = ("step", "selected_on", "remat", "param_dtype")
    hashed = {name: value for name, value in former.items() if name not in ignored}
    digest.update(json.dumps(hashed, sort_keys=True).encode())
    for path, array in jax.tree_util.tree_leaves_with_path(retriever.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(array).tobytes())
    assert indexing.fingerprint(retriever) == digest.hexdigest()
    assert indexing.fingerprint(dataclasses.replace(retriever, config=former)) == digest.hexdigest()
    of_hub = {**retriever.config, "base_model": "openai/clip-vit-base-patch32"}
    assert indexing.fingerprint(dataclasses.replace(retriever, config=of_hub)) == digest.hexdigest()


@pytest.mark.parametrize(
    "field", ["preprocess.resize", "preprocess.spread", "vision.pool", "towers"]
)
def test_fingerprint_depends_on_new_fields(model, field):
    retriever = xclip_jax.load(model)
    changed = copy.deepcopy(retriever.config)
    *section, name = field.split(".")
    (changed[section[0]] if section else changed)[name] = "other"
    other = dataclasses.replace(retriever, config=changed)
    assert indexing.fingerprint(other) != indexing.fingerprint(retriever)
