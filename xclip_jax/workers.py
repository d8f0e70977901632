"""Worker processes that leave Ctrl-C to their parent and end when it is killed."""

import collections
import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool


class _Pool(ProcessPoolExecutor):
    def __exit__(self, kind, *_):
        """After an error, such as Ctrl-C, ends the jobs under way: they may take long."""
        if kind is not None:
            for process in list((self._processes or {}).values()):
                process.kill()
        self.shutdown(cancel_futures=kind is not None)

    def submit(self, *args, **kwargs):
        """Starts workers deaf to Ctrl-C: they may get one before they have begun.

        They inherit the mask; the parent hears of what came meanwhile as soon as it is lifted.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _main_hidden():
                return super().submit(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _main_hidden():
    """Workers started meanwhile do not run the caller's script again, guarded or not."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def worker_pool(jobs):
    """A ProcessPoolExecutor on all cores, of at most `jobs` processes; forking is unsafe with JAX.

    Ctrl-C goes to the whole group of processes, and the parent alone answers it. A parent that is
    killed takes its workers along.
    """
    workers = max(1, min(os.cpu_count() or 1, jobs))
    context = multiprocessing.get_context("spawn")
    return _Pool(workers, context, initializer=_end_with_parent)


def start_module(module, arguments, log):
    """Starts `python -m module arguments...` in a process that ends with this one.

    What it prints is appended to the file `log`. It is deaf to Ctrl-C, which this process answers.

    Returns:
        its multiprocessing.Process.
    """
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run_module, args=(module, arguments, log))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _main_hidden():
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def _run_module(module, arguments, log):
    _end_with_parent()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_jobs(function, jobs, done):
    """Calls `function` on every job on all cores, and `done(index, result)` here as results come.

    A job that brings its process down takes only itself with it, and its result is None: the jobs
    that were running then are tried again, each in a process of its own.
    """
    todo = collections.deque(range(len(jobs)))
    while todo:
        for index in _run_pool(function, jobs, todo, done):
            if _run_pool(function, jobs, collections.deque([index]), done):
                done(index, None)


def _run_pool(function, jobs, todo, done):
    """Works off `todo` (emptied as it goes); returns the jobs in flight if the pool broke."""
    at_once = 2 * os.cpu_count()
    with worker_pool(len(todo)) as pool:
        running = {}
        while todo or running:
            try:
                while todo and len(running) < at_once:
                    running[pool.submit(function, jobs[todo[0]])] = todo[0]
                    todo.popleft()
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                results = [(future, future.result()) for future in ended]
            except BrokenProcessPool:  # from submit as well, if it broke in the meantime
                return list(running.values())
            for future, result in results:
                done(running.pop(future), result)
    return []


def _end_with_parent():
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
