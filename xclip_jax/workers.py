"""Runs jobs in worker processes of this machine, which end with their parent, or on Beam."""
# pyright: reportMissingImports=false

import collections
import contextlib
import json
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

from xclip_jax.cli import InputError, first_line

BeamRunner = tuple[str, Any]  # (name, PipelineOptions)
Function = Callable[[Any], Any]


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
    Process = _WorkerProcess


@contextlib.contextmanager
def worker_pool(jobs: int) -> Iterator[Executor]:
    """Yields a pool of processes, one per core and at most one per job.

    They are killed on an exception such as KeyboardInterrupt, and end if this process is killed.
    """
    workers = max(1, min(os.cpu_count() or 1, jobs))
    with ProcessPoolExecutor(workers, _WorkerContext(), initializer=end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if isinstance(process, _WorkerProcess):
                    process.kill()
            raise


def run_jobs(function: Function, jobs: Sequence[Any], done: Callable[[int, Any], Any]) -> None:
    """Calls `function` on every job in worker processes, and `done(index, result)` in this one.

    Results arrive in any order. A job that crashes its process has the result None; as a crash
    breaks the pool, the other jobs in flight run again, each in a pool of its own.
    """
    in_flight = 2 * (os.cpu_count() or 1)  # with more, results would wait in memory

    def run_until_crash(todo: collections.deque[int]) -> list[int]:
        """Runs the jobs in `todo` and returns those in flight if a process crashed."""
        running: dict[Future, int] = {}
        with worker_pool(len(todo)) as pool:
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

    todo = collections.deque(range(len(jobs)))
    while todo:
        for index in run_until_crash(todo):
            if run_until_crash(collections.deque([index])):
                done(index, None)


def start_module(module: str, arguments: Sequence[str], log: str | Path) -> SpawnProcess:
    """Starts `python -m module arguments...` in a process that ends with this one.

    It inherits a blocked SIGINT; its output is appended to the file `log`.
    """
    process = _WorkerProcess(target=_run_module, args=(module, list(arguments), log))
    process.start()
    return process


def _run_module(module: str, arguments: list[str], log: str | Path) -> None:
    end_with_parent()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def end_with_parent() -> None:
    """Ends this process as soon as its parent has ended."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def parse_beam_flags(name: str, options: str) -> BeamRunner:
    """Parses the name of a runner, such as FlinkRunner, and its flags, or raises InputError."""
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners import create_runner
    except ImportError:
        problem = "--beam_runner requires Apache Beam: pip install -e '.[beam]' (docs/data.md)"
        raise InputError(problem) from None
    try:
        create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"--beam_runner={name}: {error}") from None
    return name, PipelineOptions(options.split())


def map_on_beam(function: Function, items: Sequence[Any], folder: Path, runner: BeamRunner) -> list:
    """Returns function(item) for every item in order, computed on Apache Beam.

    The machines share `folder`, under the same path, and write their results into it. `function`
    returns a JSON value; function and items are pickled. A failed runner raises InputError.
    """
    import apache_beam as beam

    prefix = folder / "beam_results"
    for old in folder.glob(f"{prefix.name}-*"):
        old.unlink()
    name, options = runner
    try:
        with beam.Pipeline(runner=name, options=options) as stages:
            numbered = stages | beam.Create(list(enumerate(items)))
            spread = numbered | beam.Reshuffle()  # else the runner may fuse them into one bundle
            lines = spread | beam.Map(lambda item: json.dumps([item[0], function(item[1])]))
            _ = lines | beam.io.WriteToText(str(prefix))
    except Exception as error:  # runners may raise any exception
        raise InputError(f"Apache Beam's {name} failed: {first_line(error)}") from error
    results = {}
    for path in folder.glob(f"{prefix.name}-*"):
        results.update(map(json.loads, path.read_text().splitlines()))
        path.unlink()
    return [results[index] for index in range(len(items))]
