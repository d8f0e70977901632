"""Several processes as one program: how they meet, who speaks, what they tell each other.

Every process runs the same code on its own devices and its own share of the data; the first one
writes logs, reports and model directories.
"""

import contextlib
import pickle
import re
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from xclip_jax.cli import InputError, silence

PREEMPTED = 75  # exit status (EX_TEMPFAIL): saved, and the same command goes on
JOIN_SECONDS = 300  # after which those that wait for a missing process end
LOST_SECONDS = 60  # after which a process that is gone ends the others


def connect(coordinator, num_processes, process_id):
    """Joins the other processes, if there are any; before anything else of JAX.

    Args:
        coordinator: HOST:PORT of the first process, the same for all; None: as the cluster says
            (Cloud TPU, GKE, SLURM, MPI), or alone where there is none.
        num_processes, process_id: needed with a coordinator.

    Raises:
        InputError: only a part of the three is given, or they do not fit.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise InputError("--coordinator, --num_processes and --process_id go together")
    if all(given) and not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(f"--coordinator={coordinator}: must be HOST:PORT")
    if all(given) and num_processes < 1:
        raise InputError(f"--num_processes={num_processes}: must be at least 1")
    if all(given) and not 0 <= process_id < num_processes:
        raise InputError(f"--process_id={process_id}: must be from 0 to {num_processes - 1}")
    if process_id == 0 and num_processes > 1:
        print(
            f"waiting for {num_processes} processes at {coordinator}, at most {JOIN_SECONDS} s",
            flush=True,
        )
    options = {
        "initialization_timeout": JOIN_SECONDS,
        "heartbeat_timeout_seconds": LOST_SECONDS,
        "shutdown_timeout_seconds": LOST_SECONDS,
    }
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, **options)
    except ValueError as error:
        # On a cluster that JAX cannot make sense of, each process would train alone.
        if "coordinator_address should be defined" not in str(error):
            raise InputError(f"cannot join the other processes: {error}") from None
    if not is_first_process():
        silence()


def is_first_process():
    """Whether this process speaks and writes for all."""
    return jax.process_index() == 0


def print_once(text):
    """Prints, once for all processes."""
    if is_first_process():
        print(text, flush=True)


def wait_for_all(name):
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather_objects(value):
    """A list of every process's `value`, in their order; anything that can be pickled."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int64(len(data)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def report_failed_process():
    """Of several processes, says which one failed, and that all can be started again."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        if jax.process_count() > 1:
            print(
                f"process {jax.process_index()} of {jax.process_count()} failed or lost another: "
                "start all again, the run goes on from its last checkpoint",
                file=sys.stderr,
            )
        raise


class Preemption:
    """Notices SIGTERM, by which clusters announce that a machine is about to be taken away.

    With several processes JAX passes the notice on, so that all stop after the same step.
    """

    def __init__(self):
        self._noticed = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, *_):
        self._noticed = True

    def reached(self, step):
        """Whether to save and stop after this step; to be asked after every step."""
        return self._noticed or multihost_utils.reached_preemption_sync_point(step)


def stop_when_preempted():
    """SIGTERM just ends the program: to be called where there is nothing to save.

    With several processes not before training, which needs the handler that JAX has set.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))


def shutdown():
    """Ends together with the others: they fail if the first process goes before them."""
    if jax.process_count() > 1:
        wait_for_all("the end")
        jax.distributed.shutdown()
