"""Tests of the conversion of VideoPrism-LvT, and of files that it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
import videoprism_files
from videoprism_files import TEXTS, arrays, checkpoint, directory

import xclip_jax
from xclip_jax.cli import InputError
from xclip_jax.convert.exporting import export
from xclip_jax.convert.importing import convert, import_model
from xclip_jax.convert.reading import Options
from xclip_jax.data.text import load_tokenizer
from xclip_jax.models.config import check_model

__all__ = ["arrays", "checkpoint", "directory"]  # fixtures


def test_conversion_reads_sizes_and_settings(checkpoint):
    config = import_model(checkpoint).config
    assert (config.embed_dim, config.max_words, config.max_frames) == (16, 64, 3)
    v, t = config.vision, config.text
    assert (v.image_size, v.patch_size, v.mlp_width, v.heads) == (12, 4, 40, 2)
    assert (v.layers, v.temporal_layers, v.joint_layers, v.num_frames) == (2, 1, 1, 3)
    assert (t.vocab_size, t.layers, t.mlp_width, t.start_token) == (42, 2, 0, False)
    assert config.preprocess.spread
    assert config.preprocess.interpolation == "lanczos"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vision.pool", "class_token"),
        ("vision.projection", "linear"),
        ("vision.temporal_layers", 0),
        ("vision.num_frames", 0),
        ("text.causal", False),
    ],
)
def test_fields_that_the_towers_do_not_have_are_refused(checkpoint, field, value):
    section, name = field.split(".")
    config = import_model(checkpoint).config
    part = dataclasses.replace(getattr(config, section), **{name: value})
    with pytest.raises(ValueError, match="must be"):
        check_model(dataclasses.replace(config, **{section: part}))


BAD = {
    "no text": (lambda a: {k: v for k, v in a.items() if "text_encoder" not in k}, "text_encoder"),
    "missing": (lambda a: {k: v for k, v in a.items() if "per_dim" not in k}, "per_dim_scale"),
    "unknown": (lambda a: a | {"params/post_ln/scale": np.zeros(3, "f4")}, "post_ln/scale"),
    "other": (lambda a: {"weights": np.zeros(3)}, "found weights"),
    "NaN": (
        lambda a: a | {"params/text_encoder/cls_emb": np.full((1, 1, 16), np.nan, "f4")},
        "NaN",
    ),
    "patches": (
        lambda a: a | {"params/vision_encoder/patch_projection/linear/kernel": np.zeros((47, 16))},
        "patch_projection has 47 rows",
    ),
    "shape": (
        lambda a: a | {"params/text_encoder/unimodal_ln/scale": np.zeros(3, "f4")},
        "ln_final.weight has shape",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_file_of_another_kind_is_refused(arrays, tmp_path, case):
    change, message = BAD[case]
    folder = videoprism_files.write(tmp_path / "bad", change(arrays))
    with pytest.raises(InputError, match=message):
        import_model(folder)


def test_vocabulary_of_another_size_is_refused(arrays, tmp_path):
    folder = videoprism_files.write(tmp_path / "small", arrays)
    for content, message in (
        (videoprism_files.learn_vocabulary(39), "has 39 pieces, but the text tower has 42"),
        (b"", "the file is empty"),
    ):
        (folder / "sentencepiece.model").write_bytes(content)
        with pytest.raises(InputError, match=message):
            import_model(folder)


def test_option_that_the_model_contradicts_is_refused(checkpoint):
    with pytest.raises(InputError, match="--activation=gelu: VideoPrism-LvT has relu: omit it"):
        import_model(checkpoint, Options(activation="gelu"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"no archive at all"])
def test_corrupted_file_is_refused(arrays, tmp_path, content):
    folder = videoprism_files.write(tmp_path / "bad", arrays)
    next(folder.glob("*.npz")).write_bytes(content)
    with pytest.raises(InputError, match=r"not a complete \.npz file"):
        import_model(folder)
    (folder / "sentencepiece.model").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no model of SentencePiece"):
        load_tokenizer(folder)


def test_pickled_arrays_are_refused(arrays, tmp_path):
    bad = arrays | {"params/text_encoder/cls_emb": np.array([print], object)}
    with pytest.raises(InputError, match=r"not a complete \.npz file"):
        import_model(videoprism_files.write(tmp_path / "bad", bad))


def test_tokenizer_of_another_family_is_refused(tmp_path):
    tiny.learn_tokenizer(TEXTS).save(tmp_path / "clip")
    larger = videoprism_files.draw(videoprism_files.Sizes(vocab=600))
    folder = videoprism_files.write(tmp_path / "large", larger, vocab_size=42)
    with pytest.raises(InputError, match="ends texts with an end token, unlike the model"):
        import_model(folder, Options(vocab=tmp_path / "clip"))


def test_export_to_transformers_is_refused(directory, tmp_path):
    with pytest.raises(InputError, match="transformers has no model with"):
        export(directory, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_model_without_a_vocabulary_says_where_it_is(arrays, tmp_path, capsys):
    folder = videoprism_files.write(tmp_path / "small", arrays)
    (folder / "sentencepiece.model").unlink()
    convert(folder, tmp_path / "model")
    assert "--vocab=sentencepiece.model, from https://" in capsys.readouterr().out
    assert xclip_jax.load(tmp_path / "model").tokenizer is None


def test_file_beside_the_port_of_transformers_is_used(arrays, tmp_path):
    folder = videoprism_files.write(tmp_path / "small", arrays)
    (folder / "config.json").write_text(json.dumps({"model_type": "videoprism_clip"}))
    (folder / "model.safetensors").write_bytes(b"")
    assert import_model(folder).kind == "VideoPrism-LvT npz"
