"""Tests of the SLURM batch script."""

import os
import shlex
import signal
import sys

import kills
import pytest
import tiny
from launcher import LAUNCH, ROOT, VARIABLES, finished, launcher, program

__all__ = ["launcher"]  # the fixture

SRUN = ["srun", "--kill-on-bad-exit=0", "--cpus-per-task=8", "--label"]


def slurm(launcher, *arguments, **options):
    job = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "8"}
    return launcher.popen(["slurm.sbatch", *arguments], variables=VARIABLES | job, **options)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True), (137, False)])
def test_slurm_requeues_only_preempted_jobs(launcher, status, requeued):
    launcher.answers(programs=[status])
    assert finished(slurm(launcher, "--config.train.epochs=1"))[0] == status
    assert launcher.calls("scontrol") == ([["scontrol", "requeue", "17"]] if requeued else [])
    words = program("/scratch/me", "--config.train.epochs=1")
    cache = "JAX_COMPILATION_CACHE_DIR=/scratch/me/jax_cache"
    assert launcher.calls("srun") == [[*SRUN, "env", cache, "python", *words]]
    assert launcher.calls("python") == [["python", *words]]


TWO_TASKS = """
while [[ $1 == --* ]]; do shift; done
pids=()
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""

CONNECT = """
import jax
from xclip_jax import distributed

distributed.connect(None, None, None)
distributed.print_once(f"processes {distributed.gather_objects(jax.process_index())}")
distributed.shutdown()
"""


def two_tasks(launcher, python, variables):
    """Runs the script with two tasks in the environment that SLURM sets, returns their output."""
    launcher.add_fake("srun", TWO_TASKS)
    launcher.add_fake("python", python)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "JAX_PLATFORMS": "cpu"}
    job |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_SUBMIT_DIR": str(ROOT)}
    started = launcher.popen(["slurm.sbatch"], variables=VARIABLES | job | variables)
    output, errors = started.communicate(timeout=150)
    assert started.returncode == 0, errors
    return output


def test_slurm_tasks_connect(launcher):
    python = f"exec {sys.executable} -c {shlex.quote(CONNECT)}"
    output = two_tasks(launcher, python, {"PYTHONPATH": str(ROOT)})
    assert output.count("processes") == 1  # only one process prints
    assert "processes [0, 1]" in output


@pytest.mark.slow  # tests/preemption_test.py trains by two processes
def test_slurm_tasks_train_together(launcher, tmp_path):
    """Runs the real program."""
    config = kills.write_config(tmp_path, tiny.make_dataset(tmp_path / "data"), epochs=1)
    variables = {"NAME": "two", "CONFIG": str(config), "DATA": "data", "SHARED": str(tmp_path)}
    output = two_tasks(launcher, f'exec "{sys.executable}" "$@"', variables)
    assert "on 2 x cpu" in output
    assert output.count("report: ") == 1  # only one process prints
    assert (tmp_path / "runs/two/results.json").is_file()


def test_slurm_forwards_the_signal_and_waits_for_the_tasks(launcher):
    (launcher.folder / "keep_going").touch()
    job = slurm(launcher)
    launcher.wait_for("started")
    job.send_signal(signal.SIGTERM)  # to the batch shell alone, as --signal=B: has it
    status, output = finished(job)
    assert status == 75
    assert output == (
        "training with /scratch/me/jax_cache\nsaving\n"
        "checkpoint saved; requeued (restarts so far: 0)\n"
    )
    assert launcher.calls("scontrol") == [["scontrol", "requeue", "17"]]


def test_slurm_options_request_one_process_per_gpu_and_a_signal():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH ")]
    options = dict(option.partition("=")[::2] for option in options)
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options  # see the file
    assert options["signal"] == "B:TERM@120"
    assert "requeue" in options
    assert (options["open-mode"], options["output"]) == ("append", "%x-%j.log")
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(
        line.startswith("#SBATCH") for line in lines[first:]
    )  # SLURM stops reading there
