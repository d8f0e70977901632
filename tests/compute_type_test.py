"""Tests of the compute type that depends on the device, model.dtype=auto."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from trainings import data

import xclip_jax
from xclip_jax import inference, train
from xclip_jax.checkpoint import read_config
from xclip_jax.models import ModelConfig, XClip
from xclip_jax.workdir import check_same_run

__all__ = ["data"]  # the fixture
MSRVTT = Path(__file__).resolve().parents[1] / "configs" / "msrvtt.py"


@pytest.mark.parametrize(("backend", "chosen"), [("cpu", "float32"), ("gpu", "bfloat16")])
def test_automatic_type_is_that_of_the_device(monkeypatch, capsys, backend, chosen):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    inference._print_note.cache_clear()
    config = ModelConfig()
    assert (config.dtype, config.compute_dtype) == ("auto", chosen)
    assert ModelConfig(dtype="float32").compute_dtype == "float32"
    for _ in range(2):
        inference.note_compute_dtype(config)
        inference.note_compute_dtype(ModelConfig(dtype="bfloat16"))
    assert capsys.readouterr().err.count("computing in bfloat16") == (chosen != "float32")


def test_model_computes_in_the_type_of_the_device(tmp_path, monkeypatch):
    folder = tiny.make_model(tmp_path / "model")
    assert read_config(folder)[0]["dtype"] == "auto"
    retriever = xclip_jax.load(folder)

    def program():
        def encode(ids, mask):
            apply = XClip(retriever.model.config).apply
            return apply({"params": retriever.params}, ids, mask, method="encode_text")

        ids = jnp.ones((2, 8), jnp.int32)
        return str(jax.make_jaxpr(encode)(ids, ids > 0))

    assert "bf16" not in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "bf16" in program()


def test_preset_of_the_release_computes_in_float32():
    spec = importlib.util.spec_from_file_location("msrvtt", MSRVTT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.get_config("official").model.dtype == "float32"
    assert module.get_config().model.dtype == "auto"


def test_run_of_an_earlier_version_is_resumed(data, tmp_path):
    config = tiny.make_config(data, epochs=1)
    train.train(config, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    saved = json.loads(file.read_text())
    former = {"model.dtype": "float32", "model.remat": "none", "train.micro_batch": 0}
    assert {saved[field] for field in former} == {"auto", None}
    file.write_text(json.dumps(saved | former))
    check_same_run(tmp_path / "run", config, train.Setup(config).dataset)
    config.model.dtype = "bfloat16"
    with pytest.raises(xclip_jax.InputError, match=r"model.dtype was 'float32', is 'bfloat16'"):
        check_same_run(tmp_path / "run", config, train.Setup(config).dataset)
