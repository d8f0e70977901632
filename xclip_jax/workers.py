"""Worker processes that ignore Ctrl-C and end when their parent process ends."""

import collections
import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any


class _WorkerProcess(SpawnProcess):
    """A process that inherits a blocked SIGINT and does not import the caller's script.

    Ctrl-C is sent to the whole process group and may arrive before a worker has started. Forking
    is unsafe once JAX has started its threads, hence spawn.
    """

    def start(self) -> None:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _WorkerContext(SpawnContext):
    """The multiprocessing context of `_WorkerProcess`."""

    Process = _WorkerProcess


@contextlib.contextmanager
def worker_pool(jobs: int) -> Iterator[Executor]:
    """Yields a pool of processes, one per core and at most one per job.

    On an exception such as KeyboardInterrupt the processes are killed, since jobs may take long.
    They also end if this process is killed.
    """
    workers = max(1, min(os.cpu_count() or 1, jobs))
    with ProcessPoolExecutor(workers, _WorkerContext(), initializer=_end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if isinstance(process, _WorkerProcess):
                    process.kill()
            raise


def run_jobs(
    function: Callable[[Any], Any], jobs: Sequence[Any], done: Callable[[int, Any], Any]
) -> None:
    """Calls `function` on every job in worker processes, and `done(index, result)` in this one.

    Results arrive in any order. A job that crashes its process has the result None; as a crash
    breaks the pool, the other jobs in flight run again, each in a pool of its own.
    """
    todo = collections.deque(range(len(jobs)))
    while todo:
        for index in _run_until_crash(function, jobs, todo, done):
            if _run_until_crash(function, jobs, collections.deque([index]), done):
                done(index, None)


def _run_until_crash(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    todo: collections.deque[int],
    done: Callable[[int, Any], Any],
) -> list[int]:
    """Runs the jobs in `todo` and returns those in flight if a process crashed."""
    in_flight = 2 * (os.cpu_count() or 1)  # with more, results would wait in memory
    with worker_pool(len(todo)) as pool:
        running: dict[Future, int] = {}
        while todo or running:
            try:
                while todo and len(running) < in_flight:
                    running[pool.submit(function, jobs[todo[0]])] = todo[0]
                    todo.popleft()
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                results = [(future, future.result()) for future in finished]
            except BrokenProcessPool:  # raised by submit as well
                return list(running.values())
            for future, result in results:
                done(running.pop(future), result)
    return []


def start_module(module: str, arguments: Sequence[str], log: str | Path) -> SpawnProcess:
    """Starts `python -m module arguments...` in a process that ends with this one.

    It inherits a blocked SIGINT; its output is appended to the file `log`.
    """
    process = _WorkerProcess(target=_run_module, args=(module, list(arguments), log))
    process.start()
    return process


def _run_module(module: str, arguments: list[str], log: str | Path) -> None:
    _end_with_parent()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    """Ends this process as soon as its parent has ended."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
