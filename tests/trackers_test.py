"""Tests of TensorBoard and Weights & Biases: the same numbers, resumed runs, failures."""

import importlib.util
import logging
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import wandb_files
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from xclip_jax import config, trackers
from xclip_jax.cli import InputError
from xclip_jax.monitor import Monitor, read_metrics

RESULTS = {"test/text_to_video/R@1": 50.0, "test/video_to_text/R@1": 25.0}
RECALLS = {"text_to_video": {"R@1": 40.0}, "video_to_text": {"R@1": 20.0}}


def make_config(**log):
    c = tiny.make_config("data")
    c.model.tau = 0.5
    c.log.update(log)
    return c


def log_step(monitor, step, loss):
    values = {"loss": loss, "gradient_norm": 1.0, "accuracy": 0.5}
    monitor.log_step(step, {k: jnp.float32(v) for k, v in values.items()}, truncated=0)


def log_training(c, workdir, start=0, stop=3):
    """Logs steps as training does, with a validation after the last one."""
    workdir.mkdir(exist_ok=True)
    with Monitor(c, workdir, lambda step: 0.1 * step, range(start, stop)) as monitor:
        for step in range(start + 1, stop + 1):
            log_step(monitor, step, 1 / step)
        monitor.flush()
        monitor.log_validation(stop, "val", RECALLS)


def log_results(c, workdir, step=3):
    picture = workdir / "ranks.png"
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(picture)
    with trackers.open_trackers(c, workdir) as opened:
        for tracker in opened:
            tracker.log_results(step, RESULTS, {"ranks": picture})


def read_events(workdir):
    """Returns [(step, tag, summary value)] of a folder's event files, in order."""
    values = []
    for path in sorted(workdir.glob("events.out.*")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12 : position + 12 + length])
            values += [(event.step, value.tag, value) for value in event.summary.value]
            position += length + 16
    return values


def test_tensorboard_holds_the_lines_of_metrics_and_the_results(tmp_path):
    c = make_config(tensorboard=True)
    log_training(c, tmp_path)
    log_results(c, tmp_path)
    events = read_events(tmp_path)
    scalars = [(s, tag, v.simple_value) for s, tag, v in events if v.HasField("simple_value")]
    expected = [
        (line["step"], tag.replace("@", "_"), pytest.approx(value, rel=1e-6))
        for line in [*read_metrics(tmp_path), {"step": 3, **RESULTS}]
        for tag, value in line.items()
        if tag not in ("step", "seconds")
    ]
    assert scalars == expected
    (image,) = (value.image for _, _, value in events if value.HasField("image"))
    assert (image.height, image.width) == (4, 6)


def test_hyperparameters_are_the_changed_settings_with_the_final_metrics(tmp_path):
    c = make_config(tensorboard=True)
    c.model.granularities = ("frame_word",)
    log_results(c, tmp_path)
    contents = {
        tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for _, tag, value in read_events(tmp_path)
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    started = contents["_hparams_/session_start_info"].session_start_info.hparams
    assert started["model.tau"].number_value == 0.5
    assert started["model.granularities"].string_value == "['frame_word']"
    assert "optimizer.b1" not in started  # at its default
    metrics = contents["_hparams_/experiment"].experiment.metric_infos
    tags = {tag for _, tag, value in read_events(tmp_path) if value.HasField("simple_value")}
    assert {info.name.tag for info in metrics} == tags
    assert len(tags) == len(RESULTS)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # no other run


def test_missing_package_is_an_error_that_says_how_to_install_it(monkeypatch):
    find = importlib.util.find_spec
    patched = lambda name: None if name == "wandb" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", patched)
    config.validate(make_config())
    with pytest.raises(InputError, match=r"config.log.wandb = 'mine': .*pip install .*wandb"):
        config.validate(make_config(wandb="mine"))


class BrokenRun(types.SimpleNamespace):
    """A run of Weights & Biases that loses its connection after some calls of `log`."""

    def __init__(self, name, calls):
        super().__init__(id=name, config={}, rows=[], calls=calls, status=None)
        self.config = types.SimpleNamespace(update=lambda *_, **__: None)

    def define_metric(self, *_, **__):
        pass

    def log(self, row):
        if len(self.rows) == self.calls:
            raise ConnectionError("the server is gone\nand more")
        self.rows.append(row)

    def finish(self, exit_code=0):
        self.status = exit_code


@pytest.fixture
def stand_in(monkeypatch):
    """Returns a function that replaces the package wandb by one whose init makes a given run."""

    def replace(init):
        module = types.SimpleNamespace(run=None, init=init, Settings=dict)
        monkeypatch.setitem(sys.modules, "wandb", module)

    return replace


def test_lost_connection_is_one_warning_and_training_continues(tmp_path, stand_in, caplog):
    run = BrokenRun("x", calls=2)
    stand_in(lambda **_: run)
    log_training(make_config(wandb="mine"), tmp_path)
    assert [row["step"] for row in run.rows] == [1, 2]
    assert len(read_metrics(tmp_path)) == 4
    messages = [record.getMessage() for record in caplog.records]
    problem = "Weights & Biases failed, nothing more is logged to it: the server is gone"
    assert messages == [problem]


def test_refused_account_does_not_stop_a_run(tmp_path, stand_in, caplog):
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    stand_in(refuse)
    with caplog.at_level(logging.WARNING):
        log_training(make_config(wandb="mine"), tmp_path)
        log_results(make_config(wandb="mine"), tmp_path)
    assert len(read_metrics(tmp_path)) == 4
    assert "api_key not configured" in caplog.text


def test_failed_training_ends_the_run_as_failed(tmp_path, stand_in):
    run = BrokenRun("x", calls=9)
    stand_in(lambda **_: run)
    c = make_config(wandb="mine")
    log_training(c, tmp_path)
    assert run.status is None  # open for the results

    def diverge():
        with Monitor(c, tmp_path, lambda step: 0.1, range(3, 4)) as monitor:
            log_step(monitor, 4, float("nan"))
            monitor.flush()

    with pytest.raises(InputError, match="the loss is nan"):
        diverge()
    assert run.status == 1


def test_other_processes_log_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "is_first_process", lambda: False)
    with trackers.open_trackers(make_config(wandb="mine", tensorboard=True), tmp_path) as opened:
        assert opened == []
    assert list(tmp_path.iterdir()) == []


def test_offline_run_holds_the_lines_of_metrics_and_continues_when_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    c = make_config(wandb="mine")
    log_training(c, tmp_path, stop=2)
    import wandb

    wandb.finish()  # the first attempt ends
    log_training(c, tmp_path, start=2, stop=4)
    log_results(c, tmp_path, step=4)
    name, settings, history, summary = wandb_files.read_run(tmp_path / "wandb")
    assert name == (tmp_path / trackers.WANDB_ID).read_text()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    assert settings["model.tau"] == 0.5
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(tmp_path)]
    *rows, pictures = history
    assert rows == [*lines, {"step": 4, **RESULTS}]
    assert pictures["ranks/_type"] == "image-file"
    assert (pictures["step"], pictures["ranks/width"]) == (4, 6)
    assert {name: summary[name] for name in RESULTS} == RESULTS
