"""Tests of model directories that were edited, or cannot be read or written."""

import json
import os
import shutil

import jaxtyping
import pytest
import tiny

from xclip_jax import checkpoint
from xclip_jax.checkpoint import load_model, save_model
from xclip_jax.cli import InputError


@pytest.fixture(scope="module")
def one_model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("one") / "model")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vision.heads", 0, "vision.heads = 0: must be a whole number of at least 1"),
        ("vision.width", 10**6, "vision.width = 1000000: must be a whole number"),
        ("vision.width", "32", "vision.width = '32': must be a whole number"),
        ("max_frames", 10**12, "max_frames = 1000000000000: must be"),
        ("max_words", 0, "max_words = 0: must be from 3 to"),
        ("tau", 0.0, "tau = 0.0: must be a number above 0"),
        ("tau", "0.1", "tau = '0.1': must be a number"),
        ("activation", "tanh", "activation = 'tanh': must be one of quick_gelu, gelu"),
        ("granularities", [], "granularities = .*: must be one or more"),
        ("dtype", "float16", "dtype = 'float16': must be one of"),
        ("preprocess.std", [0, 0, 0], "preprocess.std = .*: must be three numbers above 0"),
        ("preprocess.mean", "abc", "preprocess.mean = .*: must be three numbers"),
        ("preprocess.resize", "pad", "preprocess.resize = 'pad': must be one of crop, squash"),
    ],
)
def test_edited_model_json_is_validated(one_model, tmp_path, field, value, message, monkeypatch):
    # Users' programs do not check types at run time, as these tests do.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    folder = shutil.copytree(one_model, tmp_path / "model")
    (folder / "digests.json").unlink()
    content = json.loads((folder / "model.json").read_text())
    *groups, name = field.split(".")
    section = content[groups[0]] if groups else content
    section[name] = value
    (folder / "model.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"model.json does not describe a model: {message}"):
        load_model(folder)


def test_digests_that_are_no_file_are_not_waited_for(one_model, tmp_path, caplog):
    folder = shutil.copytree(one_model, tmp_path / "model")
    (folder / "digests.json").unlink()
    os.mkfifo(folder / "digests.json")
    assert load_model(folder)[0]["head"]
    assert "digests.json is corrupted: the files beside it are not checked" in caplog.text


def test_failed_write_of_a_model_is_one_clear_error(one_model, tmp_path, monkeypatch):
    _, model, params, _ = load_model(one_model)

    def fail(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand 500 more lines")

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", fail)
    with pytest.raises(InputError, match=r"model cannot be written: .*No space left on device$"):
        save_model(tmp_path / "model", model.config, params)
    assert not list(tmp_path.iterdir())
