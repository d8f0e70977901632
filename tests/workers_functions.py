"""Functions that tests run in worker processes."""

import os
import signal
import time
from pathlib import Path


def square(number):
    return number**2


def kill_once(job):
    """Kills its process unless the file of the job exists, then returns the process's id."""
    if job and not Path(job).exists():
        Path(job).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def kill_always(job):
    if job == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def fail(job):
    raise OSError(28, f"No space left on device: {job}")


def sleep(job):
    time.sleep(60)
