"""Worker processes that leave Ctrl-C to their parent and end when it is killed."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor


class _Pool(ProcessPoolExecutor):
    def submit(self, *args, **kwargs):
        """Starts workers deaf to Ctrl-C: they may get one before they have begun."""
        if threading.current_thread() is not threading.main_thread():
            return super().submit(*args, **kwargs)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return super().submit(*args, **kwargs)
        finally:
            signal.signal(signal.SIGINT, before)


def worker_pool(jobs):
    """A ProcessPoolExecutor on all cores, of at most `jobs` processes; forking is unsafe with JAX.

    Ctrl-C goes to the whole group of processes, and the parent alone answers it. A parent that is
    killed takes its workers along.
    """
    workers = max(1, min(os.cpu_count() or 1, jobs))
    context = multiprocessing.get_context("spawn")
    return _Pool(workers, context, initializer=_end_with_parent)


def _end_with_parent():
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
