"""Worker processes that leave Ctrl-C to their parent and end when it is killed."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor


def worker_pool(jobs):
    """A ProcessPoolExecutor on all cores, of at most `jobs` processes; forking is unsafe with JAX.

    Ctrl-C goes to the whole group of processes, and the parent alone answers it. A parent that is
    killed takes its workers along.
    """
    workers = max(1, min(os.cpu_count() or 1, jobs))
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_start)


def _start():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
