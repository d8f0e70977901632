"""Runs several processes as one program: connection, synchronisation, preemption.

Every process runs the same code on its own devices and its own part of the data. The first process
writes logs, reports and model directories.
"""

import os
import pickle
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from xclip_jax import cli
from xclip_jax.cli import InputError

PREEMPTED = 75  # exit status (EX_TEMPFAIL): a checkpoint is saved, the same command resumes
LOST_SECONDS = 60  # limit for noticing that a process has died
# Variables that SLURM, Open MPI and GKE set in every process of a job.
CLUSTER_VARIABLES = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES")
wait_for_all = multihost_utils.sync_global_devices  # returns when all called it with one name


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects to the other processes, if any, before every other use of JAX.

    `coordinator` is HOST:PORT of the first process. Without the three arguments, processes are
    detected on a cluster (Cloud TPU, GKE, SLURM, MPI), else there is one. Raises InputError if only
    some of the three are set, or one is out of range.
    """
    arguments = coordinator, num_processes, process_id
    if coordinator is not None and num_processes is not None and process_id is not None:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise InputError(f"--coordinator={coordinator}: must be HOST:PORT")
        if not 0 <= process_id < num_processes:
            below = f"--num_processes = {num_processes}"
            raise InputError(f"--process_id={process_id}: must be at least 0 and below {below}")
        if process_id == 0 and num_processes > 1:
            print(f"waiting for {num_processes} processes at {coordinator}", flush=True)
    elif any(value is not None for value in arguments):
        raise InputError("--coordinator, --num_processes and --process_id must be set together")
    limits = ("heartbeat_timeout_seconds", "shutdown_timeout_seconds")
    try:
        jax.distributed.initialize(*arguments, **dict.fromkeys(limits, LOST_SECONDS))
    except ValueError as error:  # JAX recognises no cluster, or cannot read the variables of one
        variables = ", ".join(name for name in CLUSTER_VARIABLES if name in os.environ)
        if coordinator or variables:
            detected = f" ({variables} is set)" if variables else ""
            raise InputError(f"cannot connect to the other processes{detected}: {error}") from None
    cli.progress_disabled = not is_first_process()


def is_first_process() -> bool:
    """Returns True in the process that prints and writes for all."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Prints in the first process only."""
    if is_first_process():
        print(text, flush=True)


def gather_objects(value: Any) -> list[Any]:
    """Returns the picklable `value` of every process, in process order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int64(len(data))))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def watch_for_preemption() -> Callable[[int], bool]:
    """Returns a function from a step to True if the run must save and stop after it.

    Clusters send SIGTERM before they reclaim a machine. JAX distributes the notice, so that all
    processes stop after the same step: each must call the function after every step.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point
    received = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: received.set())
    return lambda step: received.is_set()


def stop_when_preempted() -> None:
    """Makes SIGTERM end the program at once (with several processes only after training)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))


def shutdown() -> None:
    """Ends all processes together, because the others fail if the first one exits early."""
    if jax.process_count() > 1:
        wait_for_all("shutdown")
        jax.distributed.shutdown()
