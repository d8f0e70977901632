"""Tests of choosing recomputation and micro-batches by the memory that the compiler states."""

import json
import logging
import math

import jax
import numpy as np
import pytest
import tiny
from trainings import data

from xclip_jax import checkpoint, fitting, sharding, train
from xclip_jax.cli import InputError
from xclip_jax.fitting import Settings, candidates, peak_bytes

__all__ = ["data"]  # the fixture
SIZE = 8  # pairs of a batch, on one device


@pytest.fixture(scope="module")
def compiled(data):
    """Returns a setup and {settings: compiled step} of all that may be chosen."""
    setup = train.Setup(make_config(data))
    trace = train.trace_with(setup.model, setup.optimizer, setup.config, setup.mesh)
    return setup, {s: trace(s).lower().compile() for s in candidates(SIZE, 1)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XCLIP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_config(data, **train_fields):
    config = tiny.make_config(data, batch_size=SIZE, **train_fields)
    config.mesh.data = 1
    return config


def count_compilations(caplog, function):
    """Returns how often a function compiles the training step."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        function()
    text = "Finished XLA compilation of jit(train_step)"
    count = sum(text in record.getMessage() for record in caplog.records)
    caplog.clear()
    return count


def test_candidates_are_in_order_of_work():
    whole = [("none", 0), ("dots", 0), ("layers", 0)]
    halves = [("none", 152), ("dots", 152), ("layers", 152)]
    assert candidates(304, 8) == [*whole, *halves, ("layers", 16), ("layers", 8)]
    with_any = [(remat, n) for remat in ("none", "dots", "layers") for n in (150, 75, 30, 15)]
    assert candidates(300, 1) == [*whole, *with_any, ("layers", 6), ("layers", 3), ("layers", 1)]


def test_values_of_the_config_are_kept():
    assert candidates(8, 1, "dots") == [("dots", 0), ("dots", 4), ("dots", 2), ("dots", 1)]
    assert candidates(8, 1, micro_batch=2) == [("none", 2), ("dots", 2), ("layers", 2)]
    assert candidates(8, 1, "none", 0) == [("none", 0)]


def test_first_settings_that_fit_are_chosen(compiled, monkeypatch, capsys, tmp_path):
    setup, steps = compiled
    peaks = {settings: peak_bytes(step) for settings, step in steps.items()}
    for limit in sorted(set(peaks.values())):
        monkeypatch.setattr(fitting, "device_memory", lambda _, limit=limit: limit)
        monkeypatch.setenv("XCLIP_JAX_CACHE", str(tmp_path / f"{limit}"))
        expected = next(s for s, peak in peaks.items() if peak <= limit)
        setup.compile_step()
        assert f"{expected}: {limit / 2**30:.2f} GiB a device of" in capsys.readouterr().out
    chosen = {next(s for s, peak in peaks.items() if peak <= limit) for limit in peaks.values()}
    assert len(chosen) > 2
    monkeypatch.setattr(fitting, "device_memory", lambda _: min(peaks.values()) - 1)
    message = r"does not fit with model\.remat=\w+, train\.micro_batch=\d: .* GiB; try auto"
    with pytest.raises(InputError, match=message):
        setup.compile_step()


def test_all_settings_give_the_same_step(compiled):
    setup, steps = compiled
    batch = next(setup.batches(0))
    batch.pop("truncated")
    batch, results = sharding.shard_batch(batch, setup.mesh), {}
    for settings, step in steps.items():
        state, metrics = step(setup.init(), batch)
        results[settings] = jax.device_get((state.params, metrics))
    (_, (params, metrics)), *others = results.items()
    for settings, (other, values) in others:
        for name, value in metrics.items():
            assert values[name] == pytest.approx(value, rel=1e-5), (settings, name)
        # Adam's first step divides a gradient by its size, which may be that of rounding.
        close = [np.abs(a - b) for a, b in zip(*map(jax.tree.leaves, (params, other)), strict=True)]
        assert np.mean(np.concatenate([x.ravel() for x in close])) < 1e-6, settings


def test_step_is_compiled_once_where_memory_is_plentiful(data, tmp_path, caplog, capsys, cache):
    config = make_config(data, epochs=1)
    run = count_compilations(caplog, lambda: train.train(config, tmp_path / "run"))
    assert run == 1
    assert "model.remat=none, train.micro_batch=0: 0.0" in capsys.readouterr().out
    assert not cache.exists()
    assert checkpoint.read_config(tmp_path / "run/model")[0]["remat"] == "auto"


def test_choice_is_remembered(compiled, data, monkeypatch, caplog, cache):
    setup, steps = compiled
    limit = peak_bytes(steps[Settings("layers", 4)])
    monkeypatch.setattr(fitting, "device_memory", lambda _: limit)
    first = count_compilations(caplog, setup.compile_step)
    assert first > 1
    assert count_compilations(caplog, setup.compile_step) == 1
    (file,) = cache.glob("steps/*.json")
    assert Settings(**json.loads(file.read_text())) in steps
    file.write_text("{")
    assert count_compilations(caplog, setup.compile_step) == first
    other = make_config(data)
    other.optimizer.lr = 1e-4
    count_compilations(caplog, train.Setup(other).compile_step)
    assert len(list(cache.glob("steps/*.json"))) == 2  # of another step


def test_values_that_are_set_are_compiled_when_first_called(data, monkeypatch):
    monkeypatch.setattr(fitting, "device_memory", lambda _: 0)
    config = make_config(data, micro_batch=4)
    config.model.remat = "dots"
    setup = train.Setup(config)
    assert setup.compile_step() is setup.step


def test_memory_of_a_container_is_a_limit(tmp_path, monkeypatch):
    mesh, files = sharding.make_mesh(1), [tmp_path / name for name in ("missing", "max", "v1")]
    monkeypatch.setattr(fitting, "CGROUPS", files[:2])
    files[1].write_text("max\n")
    whole = fitting.device_memory(mesh)
    assert 2**20 < whole < math.inf
    monkeypatch.setattr(fitting, "CGROUPS", files)
    for limit in (2**20, 2**62):
        files[2].write_text(f"{limit}\n")
        expected = min(whole, 0.95 * limit / jax.local_device_count())
        assert fitting.device_memory(mesh) == expected
