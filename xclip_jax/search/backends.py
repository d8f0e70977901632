"""Runs jobs on workers: processes of this machine, a Ray cluster or a runner of Apache Beam.

Each class has `slots`, the number of jobs that run at the same time (None if it is unknown), and
`run`, which calls a function on every job on a worker, and `done(index, result)` here, in any
order. The function returns a JSON value, and has an argument `threads`. The result of a job that
has crashed its worker repeatedly is None.
"""
# pyright: reportMissingImports=false

import dataclasses
import functools
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax

from xclip_jax.cli import InputError, first_line
from xclip_jax.search.job_array import ArrayShard
from xclip_jax.search.ray_cluster import connect
from xclip_jax.workers import BeamRunner, map_on_beam, parse_beam_flags, run_on_processes

MAX_PROCESSES = 256
_RAY_CPUS = 4  # of a task: one encodes, all decode
_RAY_RETRIES = 2  # after a worker or its machine has failed
_BEAM_JOBS = 256  # of a pipeline, whose results are committed together
# What kinds of workers require besides pylance: {kind: (module, name)}.
_MODULES = {"ray": [("ray", "Ray")], "beam": [("apache_beam", "Apache Beam")]}
_EXTRAS = {
    "local": "workers",
    "ray": "ray",
    "beam": "workers,beam",  # in an environment of its own, see docs/scale.md
}
JobFunction = Callable[..., Any]
Done = Callable[[int, Any], Any]


@dataclasses.dataclass(frozen=True)
class LocalWorkers:
    """A number of processes of this machine."""

    slots: int

    def run(self, function: JobFunction, jobs: Sequence[Any], done: Done) -> None:
        """Runs jobs."""
        if jax.default_backend() != "cpu":
            problem = "processes cannot share an accelerator, and one process uses all of them"
            raise InputError(f"--workers=local:{self.slots}: {problem}: omit the option")
        threads = max(1, (os.cpu_count() or 1) // self.slots)
        function = functools.partial(function, threads=threads)
        run_on_processes(function, jobs, done, processes=self.slots)


@dataclasses.dataclass(frozen=True)
class RayWorkers:
    """A Ray cluster at an address, or one of this machine if the address is None.

    A task has a GPU if the cluster has GPUs.
    """

    address: str | None = None
    option: str = "ray"  # as the user wrote it

    @functools.cached_property
    def _task(self) -> dict[str, float]:
        """Resources of a task, for which it connects to the cluster."""
        import ray

        connect(f"--workers={self.option}", self.address)
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        except Exception as error:  # Ray has no common type
            raise InputError(f"the Ray cluster failed: {first_line(error)}") from None
        nodes = [node for node in nodes if node.get("CPU", 0) >= 1]
        if not nodes:
            raise InputError("--workers: the Ray cluster has no CPU")
        if with_gpus := [node for node in nodes if node.get("GPU", 0) >= 1]:
            cpus = min(node["CPU"] // node["GPU"] for node in with_gpus)
            return {"num_cpus": max(1, cpus), "num_gpus": 1}
        return {"num_cpus": min(_RAY_CPUS, *(node["CPU"] for node in nodes))}

    @property
    def slots(self) -> int:
        """Number of tasks that run at the same time."""
        import ray

        task = self._task
        kind, share = ("GPU", "num_gpus") if "num_gpus" in task else ("CPU", "num_cpus")
        return max(1, int(ray.cluster_resources()[kind] // task[share]))

    def run(self, function: JobFunction, jobs: Sequence[Any], done: Done) -> None:
        """Runs jobs."""
        import ray
        from ray import exceptions

        slots = self.slots
        options: Any = {**self._task, "max_retries": _RAY_RETRIES}
        # Else Ray ends the process of a task with a GPU, which would load the model each time.
        task: Any = ray.remote(max_calls=0, **options)(function)
        threads = int(self._task["num_cpus"])
        waiting, running = list(enumerate(jobs))[::-1], {}
        while waiting or running:
            while waiting and len(running) < 2 * slots:
                index, job = waiting.pop()
                running[task.remote(job, threads=threads)] = index
            (finished, *_), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(finished)
            try:
                result = ray.get(finished)
            except exceptions.RayTaskError as error:
                raise _to_input_error(error.cause) from None
            except exceptions.RayError as error:  # the worker or its machine failed, each time
                if not any(node["Alive"] for node in ray.nodes()):
                    raise InputError(f"the Ray cluster failed: {first_line(error)}") from None
                result = None
            done(index, result)


@dataclasses.dataclass(frozen=True)
class BeamWorkers:
    """A runner of Apache Beam, whose machines share a folder."""

    runner: BeamRunner
    folder: str
    slots: int | None = None

    def run(self, function: JobFunction, jobs: Sequence[Any], done: Done) -> None:
        """Runs jobs, of which one that crashes its worker fails the runner."""
        function = functools.partial(function, threads=None)
        for start in range(0, len(jobs), _BEAM_JOBS):
            part = jobs[start : start + _BEAM_JOBS]
            with tempfile.TemporaryDirectory(prefix="beam-", dir=self.folder) as folder:
                results = map_on_beam(function, part, Path(folder), self.runner)
            for index, result in enumerate(results, start):
                done(index, result)


def _to_input_error(error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    return InputError(f"a worker failed: {type(error).__name__}: {first_line(error)}")


Workers = LocalWorkers | RayWorkers | BeamWorkers


class Distribution(TypedDict, total=False):
    """Options of `Index.add` that share its work out."""

    # local:N (processes), ray, ray://HOST:PORT, ray:ADDRESS or beam; None: this process. Workers on
    # other machines need the index, the model and the videos under the same paths.
    workers: str | None
    # i/n: only the i-th of n parts of the files, counted from 0. Other processes may add the other
    # parts at the same time.
    shard: str | None
    # Runner of Apache Beam and its flags, see `workers.parse_beam_flags`.
    beam_runner: str | None
    beam_options: str


def parse_distribution(
    location: str, **options: Unpack[Distribution]
) -> tuple[ArrayShard, Workers | None]:
    """Parses the options of an update of an index, or raises InputError.

    Returns the files to add, and the workers, None for this process.
    """
    shard, text = options.get("shard"), options.get("workers")
    part = ArrayShard() if shard is None else ArrayShard.parse(shard)
    beam = options.get("beam_runner"), options.get("beam_options", "")
    if text != "beam" and any(beam):
        raise InputError("--beam_runner and --beam_options require --workers=beam")
    return part, None if text is None else _parse_workers(text, location, *beam)


def _parse_workers(text: str, location: str, beam_runner: str | None, beam_options: str) -> Workers:
    option = f"--workers={text}"
    kind, _, rest = text.partition(":")
    if kind not in ("local", "ray", "beam") or (kind == "beam" and rest):
        raise InputError(f"{option}: must be local:N, ray, ray://HOST:PORT, ray:ADDRESS or beam")
    for module, name in (("lance", "pylance"), *_MODULES.get(kind, ())):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{option} requires {name}: pip install -e '.[{_EXTRAS[kind]}]'")
    if kind == "local":
        count = int(rest) if re.fullmatch(r"[0-9]{1,9}", rest) else 0
        if not 1 <= count <= MAX_PROCESSES:
            raise InputError(f"{option}: must be from local:1 to local:{MAX_PROCESSES}")
        return LocalWorkers(count)
    if kind == "ray":
        return RayWorkers(text if rest.startswith("//") else rest or None, option=text)
    if "://" in location:
        raise InputError(f"{option}: --index must be a folder that all machines share")
    runner = parse_beam_flags(beam_runner or "DirectRunner", beam_options)
    return BeamWorkers(runner, os.path.abspath(location))
