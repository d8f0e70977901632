"""Tests of processes that run jobs, any of which may be killed."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
import workers_functions

from xclip_jax import workers


def run_jobs(function, jobs, processes=2):
    results = {}

    def done(index, result):
        assert index not in results
        results[index] = result

    workers.run_on_processes(function, jobs, done, processes=processes)
    assert not multiprocessing.active_children()
    return [results[index] for index in range(len(jobs))]


def test_processes_last_and_a_killed_one_is_replaced(tmp_path):
    pids = run_jobs(workers_functions.kill_once, ["", "", str(tmp_path / "a"), "", "", ""], 1)
    assert len(set(pids)) == 2
    assert None not in pids


def test_job_that_kills_its_process_each_time_has_no_result():
    assert run_jobs(workers_functions.kill_always, ["a", "bad", "b"]) == ["a", None, "b"]


def test_exception_of_a_job_is_raised_and_ends_the_processes():
    with pytest.raises(OSError, match="No space left on device: 7"):
        run_jobs(workers_functions.fail, [7])
    assert not multiprocessing.active_children()


def test_workers_end_with_the_process_that_started_them():
    script = (
        "import sys; sys.path.append(sys.argv[1]); import workers_functions\n"
        "from xclip_jax import workers\n"
        "workers.run_on_processes(workers_functions.sleep, [0, 1], print, processes=2)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    process = subprocess.Popen(command)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list child processes")
    deadline = time.monotonic() + 30
    while len(pids := children.read_text().split()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)  # until they watch their parent
    pids = children.read_text().split()
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
