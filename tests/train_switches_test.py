"""Tests of the switches of training: average of the weights, selection, resume, effect of each."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from trainings import assert_same, data, params_of

from xclip_jax import sharding, train
from xclip_jax.checkpoint import load_model

__all__ = ["data"]  # the fixture
WAYS = ("text_to_video", "video_to_text")


def make_config(data, fields, **train_fields):
    config = tiny.make_config(data, **train_fields)
    config.update_from_flattened_dict(fields)
    return config


def run_steps(config, count):
    """Returns the parameters before the first step and after each, and the metrics of all."""
    setup = train.Setup(config)
    state, batches = setup.init(), setup.batches(0)
    params, metrics = [jax.device_get(state.params)], []
    for _ in range(count):
        batch = next(batches)
        batch.pop("truncated")
        state, values = setup.step(state, sharding.shard_batch(batch, setup.mesh))
        params.append(jax.device_get(state.params))
        metrics.append({name: float(value) for name, value in values.items()})
    return params, metrics


def saved_fields(checkpoint):
    """Returns the names of the fields that a checkpoint holds."""
    tree = json.loads((checkpoint / "state" / "_METADATA").read_text())["tree_metadata"]
    return {entry["key_metadata"][0]["key"] for entry in tree.values()}


def test_average_of_the_weights_is_evaluated_and_exported(data, tmp_path):
    decay = 0.75
    config = tiny.make_config(data, epochs=2, ema=decay, select="last")
    train.train(config, tmp_path)
    (expected, *others), _ = run_steps(config, 6)
    for params in others:
        expected = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, expected, params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, params_of(tmp_path), expected)
    assert saved_fields(tmp_path / "checkpoints" / "6") == {"step", "params", "opt_state", "ema"}
    far = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, others[-1])
    assert max(jax.tree.leaves(far)) > 1e-3


def test_average_of_float16_weights_is_summed_in_float32(data):
    decay, fields = 0.999, {"optimizer.name": "bert_adam", "model.param_dtype": "float16"}
    setup = train.Setup(make_config(data, fields, ema=decay))
    state, batch = setup.init(), next(setup.batches(0))
    before = jax.device_get(state.ema)
    batch.pop("truncated")
    state, _ = setup.step(state, sharding.shard_batch(batch, setup.mesh))
    params, after = jax.device_get((state.params, state.ema))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float16", "float32"}
    for old, new, average in zip(*map(jax.tree.leaves, (before, params, after)), strict=True):
        expected = decay * old.astype(np.float64) + (1 - decay) * new.astype(np.float64)
        np.testing.assert_allclose(average, expected, rtol=3e-7, atol=1e-8)


@pytest.mark.parametrize(
    "fields",
    [
        {"train.ema": 0.9, "model.head": "tight_transformer"},  # with dropout
        {"optimizer.name": "bert_adam", "model.param_dtype": "float16"},
        pytest.param(
            {"loss.kind": "sigmoid", "model.aggregation": "weighted"}, marks=pytest.mark.slow
        ),
    ],
)
def test_resume_with_switches_matches_uninterrupted_run(data, tmp_path, fields):
    config = make_config(data, fields, epochs=2, checkpoint_every=2)
    train.train(config, tmp_path / "whole")
    # Without an average, those of earlier versions, whose checkpoints can be restored.
    fields_saved = saved_fields(tmp_path / "whole" / "checkpoints" / "6")
    assert ("ema" in fields_saved) == ("train.ema" in fields)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "6")
    shutil.rmtree(tmp_path / "resumed" / "model")
    train.train(config, tmp_path / "resumed")
    expected, found = (params_of(tmp_path / name) for name in ("whole", "resumed"))
    assert_same(found, expected)


@pytest.mark.parametrize(("by", "selected"), [("text_to_video", 3), ("mean", 2)])
def test_selection_takes_the_latest_of_the_best(data, tmp_path, monkeypatch, by, selected):
    """Validates three times: 50 / 10, 50 / 30 and 50 / 20 % text to video / video to text."""
    recalls = iter([(50.0, 10.0), (50.0, 30.0), (50.0, 20.0)])

    def metrics(*_):
        return dict(zip(WAYS, ({"R@1": recall} for recall in next(recalls)), strict=True))

    monkeypatch.setattr(train, "retrieval_metrics", metrics)
    train.train(tiny.make_config(data, epochs=3, select_by=by), tmp_path)
    assert load_model(tmp_path / "model")[0]["step"] == selected * 3


def test_learned_temperature_and_bias_are_logged_and_move(data):
    fields = {"loss.kind": "sigmoid", "model.tau_learned": True, "model.tau": 0.05}
    _, metrics = run_steps(make_config(data, fields), 2)
    assert metrics[0]["tau"] == pytest.approx(0.05)  # the first update has the rate 0
    assert metrics[0]["logit_bias"] == pytest.approx(-10)
    assert 0 < abs(metrics[1]["tau"] - 0.05) < 0.01
    assert 0 < abs(metrics[1]["logit_bias"] + 10) < 0.1


SWITCHES = [
    {"model.aggregation": "weighted"},
    {"model.aggregation": "maxsim"},
    {"model.tau_learned": True},
    {"loss.kind": "sigmoid"},
    {"loss.each_granularity": True},
    {"loss.cdcr": 0.16},
    {"optimizer.layer_decay": 0.7},
    {"optimizer.name": "bert_adam", "model.param_dtype": "float16"},
]


@pytest.mark.slow
@pytest.mark.parametrize("fields", SWITCHES, ids=lambda fields: list(fields.items())[-1])
def test_each_switch_changes_the_weights(data, fields):
    """Compares the towers after three steps from the same initial weights."""
    same = {"optimizer.name": "bert_adam"} if "model.param_dtype" in fields else {}
    runs = (run_steps(make_config(data, f), 3)[0][-1]["clip"] for f in (same, fields))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), *runs)
    assert any(jax.tree.leaves(changed))
