"""Runs jobs in worker processes of this machine, which end with their parent, or on Beam."""
# pyright: reportMissingImports=false

import collections
import contextlib
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import threading
import types
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_connections
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from xclip_jax.buckets import (
    BucketPath,
    Location,
    parse_location,
    read_file,
    remove_tree,
    write_file,
)
from xclip_jax.cli import InputError, PathLike, first_line

BeamRunner = tuple[str, Any]  # (name, PipelineOptions)
CHUNK = 256  # items of map_on_beam in a file
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
            for process in multiprocessing.active_children():
                if isinstance(process, _WorkerProcess):
                    process.kill()
            pool.shutdown(cancel_futures=True)
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


def run_on_processes(
    function: Function,
    jobs: Sequence[Any],
    done: Callable[[int, Any], Any],
    *,
    processes: int,
    attempts: int = 3,
) -> None:
    """Calls `function` on every job in processes that last, and `done(index, result)` in this one.

    Unlike those of `run_jobs`, they keep what they have loaded when another one crashes. A process
    that has crashed or was killed is replaced and its job runs again, last. The result of a job
    that has ended `attempts` processes is None. An exception of a job is raised here.
    """
    todo = collections.deque(range(len(jobs)))
    failures = collections.Counter[int]()
    workers: dict[Connection, _WorkerProcess] = {}
    running: dict[Connection, int] = {}

    def replace(connection: Connection) -> None:
        """Ends a process, and queues its job again unless it has failed too often."""
        process = workers.pop(connection)
        process.kill()
        process.join()
        connection.close()
        index = running.pop(connection)
        failures[index] += 1
        if failures[index] < attempts:
            todo.append(index)
        else:
            done(index, None)

    def give_job(connection: Connection) -> None:
        running[connection] = todo.popleft()
        try:
            connection.send(jobs[running[connection]])
        except OSError:  # it was killed while it was idle
            replace(connection)

    try:
        while todo or running:
            while todo and len(running) < processes:
                idle = [connection for connection in workers if connection not in running]
                give_job(idle[0] if idle else _start_worker(function, workers))
            for ready in wait_for_connections(list(running)):
                connection: Any = ready
                try:
                    result, error = connection.recv()
                except (EOFError, OSError):
                    replace(connection)
                    continue
                if error is not None:
                    raise error
                done(running.pop(connection), result)
    finally:
        for process in workers.values():  # they have nothing to save
            process.kill()
            process.join()


def _start_worker(function: Function, workers: dict[Connection, _WorkerProcess]) -> Connection:
    """Starts a process for `run_on_processes`, and returns the connection to it."""
    connection, other = multiprocessing.Pipe()
    workers[connection] = _WorkerProcess(target=_serve, args=(function, other), daemon=False)
    workers[connection].start()
    other.close()  # so that the connection ends with the process
    return connection


def _serve(function: Function, connection: Connection) -> None:
    """Runs one job after the other."""
    end_with_parent()
    while True:
        job = connection.recv()
        try:
            result, error = function(job), None
        except Exception as raised:
            result, error = None, raised
        connection.send((result, error))


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


def map_on_beam(
    function: Function, items: Sequence[Any], folder: PathLike | BucketPath, runner: BeamRunner
) -> list:
    """Returns function(item) for every item in order, computed on Apache Beam.

    The machines share `folder`, under the same path or in a bucket: they read the items from it and
    write their results into it. Who can write there can run code on the workers, as function and
    items are pickled. `function` returns a JSON value. A failed runner raises InputError.
    """
    import apache_beam as beam

    parent = parse_location("folder", folder) / "beam"
    remove_tree(parent)  # of a killed run
    # A worker that outlived a killed run must not write among the results of this one.
    shared, (name, options) = parent / uuid.uuid4().hex, runner
    count = write_chunks(items, shared)
    try:
        with beam.Pipeline(runner=name, options=options) as pipeline:
            add_stages(pipeline, function, shared, count)
    except Exception as error:  # runners may raise any exception
        raise InputError(f"Apache Beam's {name} failed: {first_line(error)}") from error
    results = {}
    for number in range(count):
        results.update(json.loads(read_file(shared / f"results-{number:06}.json")))
    remove_tree(parent)
    return [results[index] for index in range(len(items))]


def write_chunks(items: Sequence[Any], shared: Location) -> int:
    """Writes the items to files of CHUNK items each in a folder, and returns their number."""
    starts = range(0, len(items), CHUNK)
    for number, start in enumerate(starts):
        numbered = list(enumerate(items[start : start + CHUNK], start))
        write_file(shared / f"items-{number:06}.pickle", pickle.dumps(numbered))
    return len(starts)


def add_stages(pipeline: Any, function: Function, shared: Location, count: int) -> None:
    """Adds the stages that map the items of `count` chunks, of which it has only the numbers."""
    import apache_beam as beam

    chunks = pipeline | "chunks" >> beam.Create(range(count))
    items = chunks | "items" >> beam.FlatMap(_read_chunk, shared)
    spread = items | beam.Reshuffle()  # else a worker would process all items of a chunk
    results = spread | "results" >> beam.Map(_call, function)
    grouped = results | beam.GroupByKey()
    _ = grouped | "files" >> beam.Map(_write_results, shared)


def _read_chunk(number: int, shared: Any) -> Iterator[tuple[int, Any]]:
    """Yields (chunk, (index, item)) of the items of a chunk."""
    for numbered in pickle.loads(read_file(shared / f"items-{number:06}.pickle")):
        yield number, numbered


def _call(element: Any, function: Any) -> tuple[int, Any]:
    """Returns (chunk, (index, result)) of one item."""
    number, (index, item) = element
    return number, (index, function(item))


def _write_results(element: Any, shared: Any) -> None:
    """Writes the results of a chunk, which a repeated call replaces by the same."""
    number, results = element
    write_file(shared / f"results-{number:06}.json", json.dumps(list(results)))
