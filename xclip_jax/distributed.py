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
JOIN_SECONDS = 300  # limit for all processes to connect
LOST_SECONDS = 60  # limit for noticing that a process has died
# Variables that SLURM, Open MPI and GKE set in every process of a job.
CLUSTER_VARIABLES = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES")


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects to the other processes, if any, before every other use of JAX.

    Args:
        coordinator: HOST:PORT of the first process, the same for all processes. None: detected on
            a cluster (Cloud TPU, GKE, SLURM, MPI), else a single process.
        num_processes: number of processes; required with a coordinator.
        process_id: index of this process, from 0; required with a coordinator.

    Raises:
        InputError: only some of the three are set, or one is out of range.
    """
    if coordinator is not None and num_processes is not None and process_id is not None:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise InputError(f"--coordinator={coordinator}: must be HOST:PORT")
        if num_processes < 1:
            raise InputError(f"--num_processes={num_processes}: must be at least 1")
        if not 0 <= process_id < num_processes:
            raise InputError(f"--process_id={process_id}: must be from 0 to {num_processes - 1}")
        if process_id == 0 and num_processes > 1:
            text = f"waiting at most {JOIN_SECONDS} s for {num_processes} processes"
            print(f"{text} at {coordinator}", flush=True)
    elif any(value is not None for value in (coordinator, num_processes, process_id)):
        raise InputError("--coordinator, --num_processes and --process_id must be set together")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=LOST_SECONDS,
        )
    except ValueError as error:  # JAX recognises no cluster, or cannot read the variables of one
        variables = ", ".join(name for name in CLUSTER_VARIABLES if name in os.environ)
        if coordinator or variables:
            found = f" ({variables} is set)" if variables else ""
            raise InputError(f"cannot connect to the other processes{found}: {error}") from None
    cli.progress_disabled = not is_first_process()


def is_first_process() -> bool:
    """Returns True in the process that prints and writes for all."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Prints in the first process only."""
    if is_first_process():
        print(text, flush=True)


def wait_for_all(name: str) -> None:
    """Returns when every process has called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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
    """Returns a function that returns True if the run must save and stop after a step.

    Clusters send SIGTERM to announce that a machine is about to be reclaimed. With several
    processes JAX distributes the notice, so that all stop after the same step: every process must
    call the function after each step.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point
    received = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: received.set())
    return lambda step: received.is_set()


def stop_when_preempted() -> None:
    """Makes SIGTERM end the program at once, for phases with nothing to save.

    With several processes, call it only after training, which needs JAX's handler.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))


def shutdown() -> None:
    """Ends all processes together, because the others fail if the first one exits early."""
    if jax.process_count() > 1:
        wait_for_all("shutdown")
        jax.distributed.shutdown()
