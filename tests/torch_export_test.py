"""Tests of the export to safetensors and of examples/xclip_torch.py, which reads it."""

import ast
import json
import re
import sys
import textwrap
from dataclasses import asdict
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import xclip_torch
from heads_test import model_config
from safetensors.numpy import load_file, save_file

from xclip_jax.checkpoint import describe_model, save_model
from xclip_jax.cli import InputError
from xclip_jax.convert.exporting import export_safetensors
from xclip_jax.convert.layouts import join_pool
from xclip_jax.convert.mapping import to_tensors
from xclip_jax.convert.reading import read_source
from xclip_jax.models import XClip
from xclip_jax.models.config import HEADS, check_model
from xclip_jax.models.families import EVA02, PE, SIGLIP

WORDS, FRAMES, SIDE = 5, 4, 8


def nest(fields, **more):
    return {k.replace(".", "__"): v for k, v in fields.items()} | more


SIGLIP_CASE = nest(
    SIGLIP,
    **{"vision__class_token": False, "vision__patch_bias": True, "vision__pre_norm": False},
    **{"vision__pool": "attention", "vision__projection": "none", "vision__mlp_width": 12},
    **{"text__projection": "bias", "text__context_length": WORDS, "logit_bias": True},
    **{"vision__image_size": SIDE + 1, "vision__uncovered": 1},
)
PE_CASE = nest(PE, vision__pool="attention", vision__pool_heads=4, vision__pool_mlp_width=12)
EVA_CASE = nest(EVA02, vision__patch_bias=True, vision__pre_norm=False, vision__projection="bias")
PREPROCESS = {"preprocess__mean": (0.5, 0.4, 0.3), "preprocess__std": (0.2, 0.3, 0.4)}
CASES = {
    "paper": {"temporal__layers": 2, "text__end_id": 19, "text__pool": "end"},
    "official": {"preset": "official", "temporal__layers": 1, **PREPROCESS},
    **{head: {"head": head, "temporal__layers": 1} for head in HEADS if head != "xclip"},
    "tight_transformer, official": {"head": "tight_transformer", "preset": "official"},
    "fusion": {"fusion": "transformer", "temporal__layers": 1},
    "fusion, official": {"fusion": "transformer", "preset": "official", "logit_bias": True},
    "weighted": {"aggregation": "weighted", "temporal__type": "lstm"},
    "weighted, of CLIP's frames": {"aggregation": "weighted", "frame_features": "clip"},
    "learned tau": {"tau_learned": True, "max_scale": 5.0, "temporal__residual": True},
    "two matrices": {
        **{"granularities": ("frame_sentence", "video_word"), "preset": "official"},
        **{"temporal__type": "none", "words": "word_tokens"},
    },
    "SigLIP 2": SIGLIP_CASE,
    "PE": PE_CASE | {"padding": "competes"},
    "PE without class token": PE_CASE | {"vision__class_token": False, "vision__rotary_grid": 3},
    "EVA-02": EVA_CASE | {"words": "all_tokens"},
    "open_clip": {"activation": "gelu", "vision__epsilon": 1e-4, "text__activation": "silu"},
    "vision": {"head": "mean_pooling", "towers": "vision"},
    "text": {"head": "mean_pooling", "towers": "text", "text__causal": False},
}
OTHERS = ("max-max", "mean-mean", "mean-max", "max-mean", "maxsim")
CASES |= {name: {"aggregation": name, "temporal__type": "none"} for name in OTHERS}


@cache
def make(name):
    """Returns (linen module, random parameters, PyTorch tensors) of a case."""
    sizes = {"vision__image_size": SIDE, "vision__patch_size": 4}
    config = model_config(**sizes | CASES[name])
    check_model(config)
    model, rng = XClip(config), np.random.default_rng(1)
    params = tiny.make_params(model)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(x.dtype), params)
    return model, params, join_pool(to_tensors(params))


def write(folder, name, **changes):
    """Writes what the export writes for a case, with other values of model.json's fields."""
    model, _, tensors = make(name)
    folder.mkdir(exist_ok=True)
    described = describe_model(model.config)
    for field, value in changes.items():
        *parents, last = field.split("__")
        section = described
        for parent in parents:
            section = section[parent]
        section[last] = value
    (folder / "model.json").write_text(json.dumps(described))
    save_file(tensors, folder / "model.safetensors")
    return folder


def batch(config):
    """Returns 3 texts and 3 videos, padded, the last video without a real frame."""
    rng, side = np.random.default_rng(0), config.vision.image_size
    ids = rng.integers(1, 19, (3, WORDS)).astype(np.int32)
    words = np.arange(WORDS) < [[3], [4], [WORDS]]
    ids[np.arange(3), words.sum(1) - 1] = 19  # the end token
    frames = rng.integers(0, 256, (3, FRAMES, side, side, 3), np.uint8)
    return ids * words, words, frames, np.arange(FRAMES) < [[2], [FRAMES], [0]]


def compute(model, ids, words, frames, mask):
    """Returns the features of texts and videos, and their logits, of either module."""
    towers, found = model.config.towers, {}
    if towers != "vision":
        found["text"] = model.encode_text(ids, words)
    if towers != "text":
        found["video"] = model.encode_video(frames, mask)
    if towers == "both":
        found["logits"] = model.similarity(found["text"], found["video"])
    return found


def assert_close(actual, expected, limit):
    assert actual.shape == expected.shape
    worst = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max()
    assert worst <= limit, f"{worst:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_torch_computes_the_same_numbers(name, tmp_path):
    model, params, _ = make(name)
    inputs = batch(model.config)
    expected = tiny.apply(model, params, *inputs, method=compute)
    with torch.inference_mode():
        loaded = xclip_torch.XClip.load(write(tmp_path, name))
        found = compute(loaded, *(torch.tensor(array) for array in inputs))
    assert found.keys() == expected.keys()
    for side in {"text", "video"} & found.keys():
        for array, other in zip(found[side], jax.tree.leaves(expected[side]), strict=False):
            assert_close(array, other, 1e-5 * np.abs(other).max())
        assert (found[side].weights is None) == (expected[side].weights is None)
    if "logits" in found:
        assert np.ptp(expected["logits"]) > 0.1
        assert_close(found["logits"], expected["logits"], 1e-5)
