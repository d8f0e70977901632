"""Chooses how many threads, or worker processes, read the training batches."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

from xclip_jax.cli import first_line
from xclip_jax.data.pipeline import FOUR_THREADS, Readers
from xclip_jax.distributed import print_once

FEW_CORES = 4  # up to which four threads are the fastest
MIN_BYTES = 10**11  # of decoded frames to read, a minute or more: below, measuring does not pay
MEASURED_CLIPS = 64  # of a batch at most: enough to keep all threads busy
SECONDS = 0.7  # of one measurement, at least
GAIN = 1.1  # by which more threads must be faster
WORKERS = 4  # few, because each holds three batches in memory, but each with its own GIL
SHARED_MEMORY = "/dev/shm"
# (readers, number of clips of a batch) -> batches; their close() ends the readers.
OpenBatches = Callable[[Readers, int], Any]


def count_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_rate(open_batches: OpenBatches, readers: Readers, size: int) -> float:
    """Returns the clips per second after the first batch of `size` clips."""
    with contextlib.closing(open_batches(readers, size)) as batches:
        next(batches)
        count, start = 0, time.perf_counter()
        while count < 2 or time.perf_counter() - start < SECONDS:
            next(batches)
            count += 1
        return count * size / (time.perf_counter() - start)


def choose_readers(
    open_batches: OpenBatches, batch_size: int, clip_bytes: int, *, steps: int, cores: int
) -> Readers:
    """Returns the readers of `steps` batches, measured and printed if there is enough to read.

    That is the smallest number of threads to which more add little. Worker processes, whose start
    takes some seconds, are measured only if these threads use less than half of the cores.
    `clip_bytes` is the size of a decoded clip.
    """
    best, size = FOUR_THREADS, min(batch_size, MEASURED_CLIPS)
    if cores <= FEW_CORES or steps * batch_size * clip_bytes < MIN_BYTES:
        return best
    first = rate = measure_rate(open_batches, best, size)
    for threads in sorted({min(best.threads << n, cores) for n in range(1, 5)}):
        more = measure_rate(open_batches, Readers(threads), size)
        if more < GAIN * rate:
            break
        best, rate = Readers(threads), more
    if rate / first < cores / FEW_CORES / 2:
        workers = Readers(max(1, cores // WORKERS), WORKERS)
        try:
            _check_shared_memory(3 * WORKERS * batch_size * clip_bytes)
            more = measure_rate(open_batches, workers, batch_size)
        except Exception as error:  # of any type: it comes from another process
            print_once(f"note: no worker processes for the input: {first_line(error)}")
        else:
            best, rate = (workers, more) if more > GAIN * rate else (best, rate)
    within = f"{best.workers} processes of " if best.workers else ""
    print_once(f"input: {within}{best.threads} threads, {rate:,.0f} clips/s")
    return best


def _check_shared_memory(needed: int) -> None:
    """Raises OSError if there is too little shared memory: workers that fill it are killed."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        sizes = f"{free / 2**30:.1f} GiB free in {SHARED_MEMORY}, {needed / 2**30:.1f} needed"
        raise OSError(sizes)
