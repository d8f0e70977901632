"""Tests that runs stopped at any moment, on one or several processes, end as uninterrupted ones."""

import functools
import signal
import subprocess
import sys

import kills
import numpy as np
import pytest
import scale_worker
import tiny

from xclip_jax.monitor import read_metrics

EPOCHS = 8  # of three steps each
SPLIT = """
from xclip_jax import sharding
sharding.SPLIT_SIZE = 256  # the model is tiny
"""
MEMORY = ["--config.mesh.fsdp=2", "--config.train.micro_batch=4", "--config.loss.block_cells=256"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = kills.write_config(folder, tiny.make_dataset(folder / "data"), EPOCHS)
    config.write_text(config.read_text() + SPLIT)
    return folder


def start_two(folder, name):
    return kills.Run(folder / "config.py", folder / name, processes=2, fields=MEMORY)


@pytest.fixture(scope="module")
def whole(folder):
    """Returns the work directory of an uninterrupted run on two processes."""
    run = start_two(folder, "whole")
    assert run.end() == [0, 0], run.output()[-3000:]
    return run.workdir


def assert_same(workdir, whole):
    for a, b in zip(kills.weights(whole), kills.weights(workdir), strict=True):
        np.testing.assert_array_equal(a, b)
    one, other = (kills.read_results(path) for path in (whole, workdir))
    assert one == other


def finish_without_newest_checkpoint(folder, name):
    """Runs to the end from the checkpoint before the newest, which is cut off."""
    damaged = kills.truncate_newest(folder / name)
    run = start_two(folder, name)
    assert run.end() == [0, 0], run.output()[-3000:]
    assert f"checkpoint {damaged} is corrupted, using" in run.output()
    assert "Traceback" not in run.output()
    return run.workdir


@pytest.fixture(scope="module")
def resumed(folder):
    """Returns the work directory of a run on two processes that was stopped and resumed."""
    run = start_two(folder, "stopped")
    run.wait_until(lambda: run.steps() >= 7)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.end() == [75, 75], run.output()[-3000:]
    assert "the same command resumes" in run.output()
    return finish_without_newest_checkpoint(folder, "stopped")


MOMENTS = {
    "first step": lambda run: run.steps() >= 1,
    "mid-epoch": lambda run: run.steps() >= 14,
    "checkpoint": lambda run: kills.in_mid_save(run),
    "evaluation": lambda run: "encoding val" in run.output()[-300:],
}


@pytest.mark.slow  # tests/study_run_test.py stops and kills a run, too
def test_one_process_killed_at_any_moment_resumes(folder):
    def start(name):
        return kills.Run(folder / "config.py", folder / name)

    whole = start("whole_alone")
    assert whole.end() == [0], whole.output()[-3000:]
    for moment in MOMENTS.values():
        run = start("killed")
        run.wait_until(lambda run=run, moment=moment: moment(run))
        run.processes[0].kill()
        assert run.end() == [-signal.SIGKILL], "ended before the moment"
    run = start("killed")
    assert run.end() == [0], run.output()[-3000:]
    assert "resuming from step" in run.output()
    assert_same(run.workdir, whole.workdir)


def test_two_processes_that_resume_have_the_losses_of_one_device(folder, resumed):
    """The processes divide parameters, batch and texts to save memory. The device does not."""
    fields = {"train.epochs": EPOCHS, "mesh.data": 1}
    fields |= {"optimizer.lr": 1e-4, "optimizer.encoder_lr": 1e-4}
    request = {"data": folder / "data", "steps": 3 * EPOCHS}
    losses = [line["train/loss"] for line in read_metrics(resumed) if "train/loss" in line]
    assert losses == pytest.approx(scale_worker.losses(request, fields), abs=1e-5)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits(resumed, whole):
    assert_same(resumed, whole)


@pytest.mark.slow
def test_two_processes_resume_after_sigkill_in_mid_save(folder, whole):
    run = start_two(folder, "killed_in_save")
    complete = functools.partial(kills.complete_checkpoints, run.workdir)
    run.wait_until(lambda: len(complete()) >= 2 and kills.in_mid_save(run))
    run.processes[0].kill()
    assert 0 not in run.end(seconds=90)
    assert_same(finish_without_newest_checkpoint(folder, "killed_in_save"), whole)


ENDING = """
import os, signal, sys, time
from xclip_jax import cli, distributed

def main():
    distributed.connect(sys.argv[1], 2, int(sys.argv[2]))
    distributed.gather_objects("connected")
    if sys.argv[2] == "1":
        time.sleep(4)
    distributed.shutdown()
    distributed.stop_when_preempted()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)

cli.run_command(main)
"""


def test_processes_shut_down_together_and_end_on_sigterm():
    """Runs two processes, because JAX aborts those that outlive the first one."""
    coordinator = f"localhost:{kills.free_port()}"
    command = [sys.executable, "-c", ENDING, coordinator]
    started = [subprocess.Popen([*command, number]) for number in "01"]
    assert [process.wait(60) for process in started] == [75, 75]


@pytest.mark.slow
def test_resume_on_other_meshes_and_process_counts(folder, whole):
    """Resumes each run where the previous one was stopped."""
    config, workdir = folder / "config.py", folder / "moving"
    for stop, processes, devices, fields in (
        (5, 1, 8, ["--config.mesh.fsdp=2"]),
        (11, 1, 8, ["--config.mesh.fsdp=4", "--config.train.micro_batch=8"]),
        (17, 2, 2, ["--config.mesh.fsdp=2"]),
        (None, 1, 1, []),
    ):
        run = kills.Run(config, workdir, processes, devices, fields)
        if stop:
            run.wait_until(lambda run=run, stop=stop: run.steps() >= stop)
            run.processes[0].send_signal(signal.SIGTERM)
        assert run.end() == [75 if stop else 0] * processes, run.output()[-3000:]
    for a, b in zip(kills.weights(whole), kills.weights(workdir), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
