"""Tests that initialisation from CLIP takes every parameter from the release's source."""

import json
from dataclasses import replace

import checkpoints
import jax
import numpy as np
import pytest
import tiny

import xclip_jax
from xclip_jax import train
from xclip_jax.cli import InputError
from xclip_jax.convert.importing import convert
from xclip_jax.convert.mapping import to_tensors
from xclip_jax.convert.torch_archive import write_archive
from xclip_jax.data.text import learn_tokenizer
from xclip_jax.initialization import start_from_clip
from xclip_jax.models import XClip
from xclip_jax.models.config import VisionConfig
from xclip_jax.models.towers import resize_positions
from xclip_jax.train import configure_model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Returns (model directory of a plain CLIP with a tokenizer, its tensors)."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = learn_tokenizer(["red and then green", "first blue, then grey"])
    tokenizer.save(folder / "vocab")
    tensors = checkpoints.clip(sizes={**checkpoints.TINY, "vocab": tokenizer.vocab_size})
    write_archive(folder / "clip.pt", tensors)
    convert(
        folder / "clip.pt", folder / "model", replace(checkpoints.QUICK, vocab=folder / "vocab")
    )
    return folder / "model", tensors


def make_config(clip, data="", **model):
    c = tiny.make_config(data)
    found = json.loads((clip / "model.json").read_text())
    c.model.vision.update(found["vision"])
    c.model.text.update(found["text"])
    c.model.embed_dim = found["embed_dim"]
    c.model.temporal.update(layers=2, heads=1)
    c.model.update(model)
    c.init.clip = str(clip)
    return c


def start(config, tokenizer=None):
    tokenizer = tokenizer or learn_tokenizer(["red and then green", "first blue, then grey"])
    model_config = configure_model(config, tokenizer.vocab_size)
    fresh = tiny.make_params(XClip(model_config))
    params, rows = start_from_clip(fresh, model_config, config.init.clip)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert sum(row[1] for row in rows) == sum(x.size for x in jax.tree.leaves(params))
    return fresh, params, {row[0]: row[2] for row in rows}


def test_towers_and_temporal_encoder_are_initialised_from_clip(clip):
    folder, tensors = clip
    _, params, rows = start(make_config(folder, preset="official"))
    found = to_tensors(params)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[f"clip.{name}"], array)
        if name.startswith(("transformer.resblocks.0", "transformer.resblocks.1")):
            np.testing.assert_array_equal(
                found[name.replace("transformer", "transformerClip")], array
            )
    positions = found["frame_position_embeddings.weight"]
    np.testing.assert_array_equal(positions, tensors["positional_embedding"])
    np.testing.assert_array_equal(found["global_mat_weight"], np.eye(64))
    assert rows["temporal_encoder"] == "the first 2 blocks of CLIP's text tower and its positions"
    assert rows["aggregation_matrices"] == "identity"


def test_tight_transformer_and_random_parts(clip):
    fresh, params, rows = start(make_config(clip[0], head="tight_transformer"))
    assert rows["pair_encoder"].endswith("ln_pool, pool, score random")
    np.testing.assert_array_equal(
        params["pair_encoder"]["pool"]["kernel"], fresh["pair_encoder"]["pool"]["kernel"]
    )
    blocks = params["pair_encoder"]["encoder"]["blocks"]["fc"]["bias"]
    np.testing.assert_array_equal(blocks[1], clip[1]["transformer.resblocks.1.mlp.c_fc.bias"])
    _, _, rows = start(make_config(clip[0], head="seq_lstm"))
    assert rows["temporal_encoder"] == "random"
    config = make_config(clip[0])
    config.model.temporal.layers = 4
    fresh, params, rows = start(config)
    assert rows["temporal_encoder"].startswith("random: ")
    jax.tree.map(
        np.testing.assert_array_equal, params["temporal_encoder"], fresh["temporal_encoder"]
    )


def test_other_image_size_interpolates_positions(clip):
    config = make_config(clip[0])
    config.model.vision.image_size = 32
    _, params, rows = start(config)
    assert params["clip"]["visual"]["positions"].shape == (17, 64)
    assert "interpolated from 16 to 32 pixels" in rows["clip/visual"]
    grid = np.arange(4, dtype=np.float32).reshape(2, 2)
    flat = np.concatenate([[[9.0]], grid.reshape(4, 1)])
    vision = VisionConfig(image_size=16, patch_size=8)
    np.testing.assert_array_equal(resize_positions(flat, vision, (2, 2)), flat)
    larger = np.asarray(resize_positions(flat, vision, (4, 4)))
    assert larger[0, 0] == 9
    square = larger[1:].reshape(4, 4)
    np.testing.assert_allclose(square + square[::-1, ::-1], 3, atol=1e-5)  # symmetric as it was
    assert (np.diff(square, axis=1) > 0).all()
    assert (np.diff(square, axis=0) > 0).all()


def test_all_size_mismatches_are_named(clip):
    config = make_config(clip[0])
    config.model.vision.layers = 3
    config.model.activation = "gelu"
    with pytest.raises(InputError, match=r"activation = 'gelu': .*vision.layers = 3: must be 2"):
        start(config)
    config.init.clip = "nowhere"
    with pytest.raises(InputError, match="no model in"):
        start(config)


def test_training_starts_from_clip_and_resumes(clip, tmp_path, capsys):
    data = tiny.make_dataset(tmp_path / "data")
    config = make_config(clip[0], data, max_words=8)
    config.optimizer.name = "bert_adam"
    config.optimizer.freeze_layers = 0
    config.train.update(epochs=1, checkpoint_every=2)
    train.train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "temporal_encoder" in printed
    assert "the first 2 blocks of CLIP's text tower" in printed
    params = xclip_jax.load(tmp_path / "run").params
    found, start_tensors = to_tensors(params), clip[1]
    frozen, trained = "token_embedding.weight", "visual.proj"
    np.testing.assert_array_equal(found[f"clip.{frozen}"], start_tensors[frozen])
    assert np.abs(found[f"clip.{trained}"] - start_tensors[trained]).max() > 0
    train.train(config, tmp_path / "run")
    assert "of CLIP's text tower" not in capsys.readouterr().out


def test_clip_without_a_tokenizer_is_refused(clip, tmp_path):
    write_archive(tmp_path / "clip.pt", clip[1])
    convert(tmp_path / "clip.pt", tmp_path / "model", checkpoints.QUICK)
    config = make_config(tmp_path / "model", tiny.make_dataset(tmp_path / "data"))
    with pytest.raises(InputError, match=r"no tokenizer in .*; convert it again with --vocab"):
        train.train(config, tmp_path / "run")
