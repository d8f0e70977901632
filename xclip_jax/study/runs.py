"""Working off the runs of studies, one at a time in this process, and why one failed."""

import contextlib
import json
import re
import signal
import sys
import time

from filelock import FileLock, Timeout

from xclip_jax.cli import progress
from xclip_jax.monitor import read_metrics
from xclip_jax.report.table import DIRECTIONS
from xclip_jax.study.plan import FAILED, RESULTS
from xclip_jax.workers import start_module

LOG = "log.txt"  # in a work directory: what its runs printed
POLL_SECONDS = 1


def work_off(runs, done):
    """Runs what is not finished, one at a time, and calls `done(run)` after each.

    Several processes may do so side by side: a run that another one has under way is left to it.
    One that fails leaves its reason in its work directory, and the others go on.
    """
    start = time.time()
    todo = [run for run in runs if run.results() is None]
    with progress(len(runs), "runs", "run", initial=len(runs) - len(todo)) as bar:
        while todo:
            before = len(todo)
            for run in list(todo):
                if _try(run, start, bar):
                    todo.remove(run)
                    bar.update()
                    done(run)
            if len(todo) == before:
                _show(bar, f"{before} under way in another process")
                time.sleep(POLL_SECONDS)


def _try(run, start, bar):
    """Whether the run came to an end, here or in another process since `start`."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(Timeout), FileLock(run.workdir / "run.lock", timeout=0):
        failed = run.workdir / FAILED
        ended = failed.is_file() and failed.stat().st_mtime > start
        if not ended and run.results() is None:
            failed.unlink(missing_ok=True)
            reason = _execute(run, bar)
            if reason:
                failed.write_text(reason)
            bar.write(f"{run.name}: " + (f"failed: {reason}" if reason else _recalls(run)))
        return True
    return False


def _execute(run, bar):
    """Trains and evaluates; returns why it failed, None if it did not."""
    log = run.workdir / LOG
    log.touch()
    printed_before = log.stat().st_size
    process = start_module("xclip_jax.main", run.arguments, log)
    try:
        while process.exitcode is None:
            process.join(POLL_SECONDS)
            lines = read_metrics(run.workdir)
            _show(bar, f"{run.name}, step {lines[-1]['step'] if lines else 0}")
    finally:
        if process.exitcode is None:  # this process is told to end: the run saves and goes on later
            process.terminate()
            process.join()
    if process.exitcode == 0 and run.results() is not None:
        return None
    return _reason(process.exitcode, log.read_bytes()[printed_before:].decode(errors="replace"))


def _reason(status, printed):
    """Why a process ended, from its exit status and what it printed."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", printed) if line.strip()]
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    errors = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception)\b", line)]
    return (errors or lines or [f"exit status {status}"])[-1].removeprefix("error: ")


def _recalls(run):
    results = json.loads((run.workdir / RESULTS).read_text())
    numbers = " / ".join(f"{results[way]['R@1']:.1f}" for way, _ in DIRECTIONS)
    return f"R@1 {numbers}"


def _show(bar, text):
    bar.set_postfix_str(text, refresh=False)
    if sys.stderr.isatty():  # a log file has no use for a line a second
        bar.refresh()
