"""Tests of training: convergence, exact resume on any devices, checkpoints, refused inputs."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from trainings import assert_same, data, params_of

import xclip_jax
from xclip_jax import distributed, evaluate, sharding, train
from xclip_jax.checkpoint import load_model, open_checkpoints, restore_checkpoint, save_checkpoint
from xclip_jax.cli import InputError
from xclip_jax.metrics import summarize
from xclip_jax.monitor import read_metrics
from xclip_jax.workdir import lock_workdir

__all__ = ["data"]  # the fixture
WAYS = ("text_to_video", "video_to_text")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Returns (config, work directory) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    config = tiny.make_config(data, epochs=4, checkpoint_every=2)
    profiled = config.copy_and_resolve_references()
    profiled.log.update(profile_from=2, profile_to=3)
    train.train(profiled, workdir)
    return config, workdir


def test_training_fits_the_data_and_writes_results(data, tmp_path):
    config = tiny.make_config(data, epochs=40, eval_every=40)
    config.data.test_split = "val"
    config.loss.same_video = "ignore"
    train.train(config, tmp_path)
    results = evaluate.evaluate(config, tmp_path)
    assert results["text_to_video"]["R@1"] == 100
    assert results["video_to_text"]["R@1"] == 100
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (results["num_texts"], results["num_videos"]) == (24, 12)
    assert (tmp_path / "report" / "index.html").is_file()
    losses = [line["train/loss"] for line in read_metrics(tmp_path) if "train/loss" in line]
    assert len(losses) == 120
    assert losses[-1] < losses[0] / 4


def test_zero_epochs_keep_the_initial_weights(finished, data, tmp_path):
    config, whole = finished
    config = config.copy_and_resolve_references()
    config.init.clip = str(whole)
    config.train.epochs = 0
    train.train(config, tmp_path)
    assert_same(params_of(tmp_path)["clip"], params_of(whole)["clip"])
    results = evaluate.evaluate(config, tmp_path)
    assert results["step"] == 0
    before = (tmp_path / "model" / "model.json").read_text()
    train.train(config, tmp_path)  # no steps remain
    assert (tmp_path / "model" / "model.json").read_text() == before


def test_ranks_file_reproduces_the_metrics(finished):
    config, workdir = finished
    config = config.copy_and_resolve_references()
    config.eval.update(dual_softmax=True, qb_norm=5, hubness_bias=5)
    results = evaluate.evaluate(config, workdir)
    with np.load(workdir / evaluate.RANKS_FILE) as ranks:
        assert set(ranks) == {
            *(f"{option}{way}" for option in ("", "dual softmax/") for way in WAYS),
            "QB-Norm (5 captions)/text_to_video",
            "hubness bias (5 captions)/text_to_video",
            "text_video",
        }
        assert ranks["text_video"].tolist() == [video for video in range(12) for _ in range(2)]
        for way in WAYS:
            assert summarize(*ranks[way]) == results[way]
            normalized = results["normalized"]["dual softmax"][way]
            assert summarize(*ranks[f"dual softmax/{way}"]) == normalized


def test_evaluation_on_training_clips_is_noted(finished, capsys):
    results = evaluate.evaluate(*finished)
    assert results["split"] == "train"
    assert "trained on" in results["note"]
    assert "trained on" in capsys.readouterr().out


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "kill_after", [7, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3, 4, 11))]
)
def test_resume_matches_uninterrupted_run(finished, tmp_path, monkeypatch, kill_after):
    config, whole = finished

    def log_and_kill(self, step, metrics, truncated, original=train.Monitor.log_step):
        original(self, step, metrics, truncated)
        if step == kill_after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train.Monitor, "log_step", log_and_kill)
        with pytest.raises(Killed):
            train.train(config, tmp_path)
    train.train(config, tmp_path)
    assert_same(params_of(whole), params_of(tmp_path))
    steps = [line["step"] for line in read_metrics(tmp_path) if "train/loss" in line]
    assert steps == list(range(1, 13))  # no step is missing or repeated


def test_training_resumes_before_a_corrupted_checkpoint(finished, tmp_path, caplog):
    config, whole = finished
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    shutil.rmtree(tmp_path / "checkpoints" / str(steps[-1]) / "state" / "d")
    train.train(config, tmp_path)
    assert f"checkpoint {steps[-1]} is corrupted" in caplog.text
    assert_same(params_of(whole), params_of(tmp_path))


def test_checkpoints_of_another_model_are_refused_and_kept(finished, tmp_path):
    config, whole = finished
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").unlink()
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    other = config.copy_and_resolve_references()
    other.model.temporal.type = "none"
    with pytest.raises(InputError, match=r"no checkpoint in .* can be restored: .* another model"):
        train.train(other, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == steps
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is corrupted: "):
        train.train(config, tmp_path)


def cut(path):
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


CORRUPTIONS = {
    "a file cut": cut,
    "no state": lambda path: shutil.rmtree(path / "state"),
    "array metadata": lambda path: (path / "state/array_metadatas/process_0").write_text("?"),
}


@pytest.mark.parametrize("damage", CORRUPTIONS)
def test_corrupted_newest_checkpoint_is_skipped(tmp_path, damage, caplog):
    state = {"x": jax.device_put(np.arange(4000.0))}
    checkpoints = open_checkpoints(tmp_path)
    for step in (1, 2):
        save_checkpoint(checkpoints, step, {"x": state["x"] + step}, float(step))
    checkpoints.close()
    CORRUPTIONS[damage](tmp_path / "2")
    checkpoints = open_checkpoints(tmp_path)
    step, found = restore_checkpoint(checkpoints, state)
    assert (step, found["x"][0]) == (1, 1)
    assert "checkpoint 2 is corrupted" in caplog.text
    checkpoints.close()


@pytest.mark.parametrize("content", [b"\xff", b"", b'{"score": 3.0}', b'{"scorf": 2.0}', b"[]"])
def test_corrupted_score_is_repaired(tmp_path, content, caplog):
    state = {"x": np.arange(4.0)}
    checkpoints = open_checkpoints(tmp_path)
    for step in (1, 2):
        save_checkpoint(checkpoints, step, {"x": state["x"] + step}, 3.0 - step)
    checkpoints.close()
    (tmp_path / "2" / "metrics" / "metrics").write_bytes(content)
    checkpoints = open_checkpoints(tmp_path)
    assert "checkpoint 2 has a corrupted score, now set to {'score': 1.0}" in caplog.text
    assert restore_checkpoint(checkpoints, state)[0] == 2
    assert restore_checkpoint(checkpoints, state, best=True)[0] == 1
    checkpoints.close()


@pytest.mark.parametrize("name", ["[v2]", "a*b?", "back\\slash", "x [1] {2}"])
def test_folders_may_have_names_with_wildcards(tmp_path, name):
    folder = tmp_path / name / "checkpoints"  # made by Orbax
    state = {"x": np.arange(4.0)}
    checkpoints = open_checkpoints(folder)
    save_checkpoint(checkpoints, 1, state)
    checkpoints.close()
    checkpoints = open_checkpoints(folder)
    assert restore_checkpoint(checkpoints, state)[0] == 1
    checkpoints.close()
    tiny.make_model(tmp_path / name / "model")
    assert load_model(tmp_path / name / "model")[0]["head"]


def test_failed_write_of_a_checkpoint_is_one_clear_error(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand 500 more lines")

    checkpoints = open_checkpoints(tmp_path)
    monkeypatch.setattr(checkpoints, "save", fail)
    message = f"^no checkpoint can be written to {tmp_path}: RESOURCE_EXHAUSTED: No space left on"
    with pytest.raises(InputError, match=message) as error:
        save_checkpoint(checkpoints, 1, {"x": np.ones(2)})
    assert "\n" not in str(error.value)
    checkpoints.close()


def test_logged_gradient_norm_is_that_of_the_trained_tensors(tmp_path):
    config = tiny.make_config(tiny.make_dataset(tmp_path / "data"))
    setup = train.Setup(config)
    batch = next(setup.batches(0))
    batch.pop("truncated")
    norms = {}
    for layers in (-1, 1):
        config.optimizer.freeze_layers = layers
        setup = train.Setup(config)
        norms[layers] = float(setup.step(setup.init(), batch)[1]["gradient_norm"])
    assert 0 < norms[1] < norms[-1]


def test_second_run_in_a_work_directory_is_refused(tmp_path):
    refused = pytest.raises(InputError, match=r"another process trains in .*: wait until it ends")
    with lock_workdir(tmp_path), refused, lock_workdir(tmp_path):
        pass
    with lock_workdir(tmp_path):
        pass


@pytest.mark.parametrize("file", ["model.json", "params/_METADATA", "tokenizer/tokenizer.json"])
def test_flipped_bit_in_a_model_directory_is_noticed(tmp_path, file):
    folder = tiny.make_model(tmp_path / "model")
    load_model(folder)
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(InputError, match=f"{file}.*(differs from its digest|is not valid JSON)"):
        load_model(folder)


def test_corrupted_best_checkpoint_is_skipped(tmp_path, caplog):
    state = {"x": np.arange(4000.0)}
    checkpoints = open_checkpoints(tmp_path)
    for step, score in ((1, 9.0), (2, 5.0), (3, 7.0)):
        save_checkpoint(
            checkpoints, step, {"x": state["x"] + (np.nan if step == 1 else step)}, score
        )
    step, found = restore_checkpoint(checkpoints, state, best=True)
    assert (step, found["x"][0]) == (3, 3)
    assert "checkpoint 1 is corrupted, using 3: it contains NaN" in caplog.text
    checkpoints.close()


def test_checkpoint_is_restored_to_another_mesh(tmp_path):
    mesh = sharding.make_mesh(1, 2)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole, single = sharding.replicated(mesh), SingleDeviceSharding(jax.devices()[1])
    state = {"x": jax.device_put(np.arange(8.0), split), "y": jax.device_put(np.ones(3), whole)}
    checkpoints = open_checkpoints(tmp_path)
    save_checkpoint(checkpoints, 1, state)
    for target in (split, whole, single):
        like = {
            "x": jax.ShapeDtypeStruct((8,), state["x"].dtype, sharding=target),
            "y": jax.ShapeDtypeStruct((3,), state["y"].dtype, sharding=whole),
        }
        _, found = restore_checkpoint(checkpoints, like)
        assert found["x"].tolist() == list(range(8))
        assert found["x"].sharding == target
    checkpoints.close()


def test_newest_two_and_best_checkpoints_are_kept(tmp_path):
    state = {"x": np.arange(4.0)}
    checkpoints = open_checkpoints(tmp_path)
    for step, score in enumerate([10.0, 90.0, 30.0, 90.0, 20.0, None, 40.0], 1):
        save_checkpoint(checkpoints, step, {"x": state["x"] + step}, score)
    step, best = restore_checkpoint(checkpoints, state, best=True)
    assert (step, best["x"].tolist()) == (4, [4, 5, 6, 7])  # the latest of equals
    step, newest = restore_checkpoint(checkpoints, state)
    assert (step, newest["x"].tolist()) == (7, [7, 8, 9, 10])
    checkpoints.close()
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"4", "6", "7"} <= kept
    assert not {"1", "2", "3", "5"} & kept


@pytest.mark.parametrize(
    ("field", "value"), [("optimizer.lr", 1.0), ("seed", 3), ("model.temporal.type", "none")]
)
def test_work_directory_of_another_config_is_refused(finished, field, value):
    config, workdir = finished
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=rf"{re.escape(field)} was .*, is {value!r}"):
        train.train(changed, workdir)


def test_free_fields_may_change_on_resume(finished, tmp_path):
    config, whole = finished
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    changed = config.copy_and_resolve_references()
    changed.log.every = 5
    changed.eval.batch_size = 4
    changed.data.path = str(tmp_path / "moved")
    shutil.copytree(config.data.path, changed.data.path)
    train.train(changed, tmp_path)
    assert_same(params_of(whole), params_of(tmp_path))


def test_changed_data_is_refused(finished, tmp_path):
    config, whole = finished
    changed = config.copy_and_resolve_references()
    changed.data.path = str(tiny.make_dataset(tmp_path / "other", num_frames=4))
    with pytest.raises(InputError, match=r"data\.fingerprint"):
        train.train(changed, whole)


def test_infinite_loss_stops_the_run_and_keeps_checkpoints(data, tmp_path):
    config = tiny.make_config(data, checkpoint_every=1)
    config.optimizer.update(lr=1e30, encoder_lr=1e30, warmup=0.5)  # the first update has rate 0
    with pytest.raises(InputError, match=r"at step \d; .* Try, .* smaller config\.optimizer\.lr"):
        train.train(config, tmp_path)
    kept = [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert kept
    assert not (tmp_path / "model").exists()


def test_indivisible_batch_size_error_names_valid_sizes():
    config = tiny.make_config("", batch_size=7)
    with pytest.raises(InputError, match=r"train.batch_size = 7: .* for example 6 or 8"):
        train.check_batch_sizes(config, sharding.make_mesh(-1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.micro_batch": 3}, r"micro_batch = 3: must be a multiple of the 2 devices"),
        (
            {"train.micro_batch": 6},
            r"micro_batch = 6: must be .* that divides batch_size = 8: 2, 4, 8",
        ),
        ({"mesh.fsdp": 3}, r"mesh.fsdp = 3: must divide the 2 devices"),
        ({"mesh.data": 2, "mesh.fsdp": 2}, r"together they must be at most the 2 devices"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(data, fields, message):
    config = tiny.make_config(data)
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match=message):
        train.Setup(config)


def test_large_arrays_are_split_along_their_largest_divisible_axis():
    assert sharding.split_spec((512, 1024), 2) == PartitionSpec(None, "fsdp")
    assert sharding.split_spec((1024, 513), 2) == PartitionSpec("fsdp", None)
    assert sharding.split_spec((12, 512, 512), 4) == PartitionSpec(None, None, "fsdp")
    assert sharding.split_spec((511, 513), 2) == PartitionSpec()  # nothing divides
    assert sharding.split_spec((64, 64), 2) == PartitionSpec()  # too small
    assert sharding.split_spec((512, 1024), 1) == PartitionSpec()


@pytest.mark.slow  # tests/scale_test.py compares meshes without a resume
def test_resume_on_another_mesh_matches_within_rounding(data, tmp_path, monkeypatch):
    """Changes mesh, micro_batch and block_cells, which are free fields."""
    monkeypatch.setattr(sharding, "SPLIT_SIZE", 256)
    config = tiny.make_config(data, epochs=2)
    config.optimizer.update(lr=1e-4, encoder_lr=1e-4)
    train.train(config, tmp_path / "whole")
    monkeypatch.setattr(distributed, "watch_for_preemption", lambda: lambda step: step == 2)
    with pytest.raises(SystemExit) as stopped:
        train.train(config, tmp_path / "moved")
    assert stopped.value.code == 75
    monkeypatch.undo()
    monkeypatch.setattr(sharding, "SPLIT_SIZE", 256)
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({"mesh.fsdp": 2, "train.micro_batch": 4})
    other.loss.block_cells = 8 * 4 * 8
    train.train(other, tmp_path / "moved")
    whole, moved = (xclip_jax.load(tmp_path / name).params for name in ("whole", "moved"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), whole, moved)
    steps = [line["step"] for line in read_metrics(tmp_path / "moved") if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_profile_is_written(finished):
    assert list(finished[1].glob("plugins/profile/*/*.xplane.pb"))
