"""Serves an index from many processes or machines: its parts by Ray Serve, one front end.

The front end encodes a sentence once, asks all parts in each stage, and merges by score. It says
when a part did not answer. See https://docs.ray.io/en/latest/serve.
"""
# pyright: reportMissingImports=false

import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from xclip_jax.cli import InputError, PathLike, first_line
from xclip_jax.search.ray_cluster import connect
from xclip_jax.search.results import Answer
from xclip_jax.search.row_ids import Part
from xclip_jax.search.searcher import Searcher, T
from xclip_jax.search.shard_server import ShardServer
from xclip_jax.search.shards import LostError, Parts, Shards, UnavailableError
from xclip_jax.search.store import Store, exists

ASK_SECONDS = 1.0  # after which a part must show that it lives
PING_SECONDS = 0.4  # in which it must show this
WAIT_SECONDS = 120.0  # for the answer of a part that lives, e.g. reads frames from a bucket
LOAD_SECONDS = 3600.0  # in which a part must have loaded a version
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.5, 5.0  # between attempts to reach a lost part
_LOST = object()  # result of a part that does not answer
# Of the parts: they compute as one process without a GPU does.
_NAMESPACE = "xclip_jax"  # of the actors of front ends
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}


class ShardedIndex(Searcher):
    """An index whose segments are held by processes of a Ray cluster.

    Attributes are those of `Searcher`.
    """

    concurrency = 8

    def __init__(self, store: Store, deploy: Callable[[], list[Any]], **options: Any) -> None:
        """Opens an index. `deploy` starts its parts and returns Ray Serve's handles of them."""
        super().__init__(store, **options)
        self.retriever  # noqa: B018  (a wrong model must fail before it is loaded by all parts)
        self._handles, self._lost = deploy(), set[int]()
        self._refreshing, self._losing = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._version, self._sizes, self._num_files = 0, dict[int, tuple[int, int]](), (0, 0)
        self.refresh()
        if empty := sum(not segments for segments, _ in self._sizes.values()):
            name = f"{empty} of {len(self._handles)} shards"
            logging.warning("%s hold no segment of this small index: use fewer", name)

    @property
    def num_segments(self) -> int:
        """Number of segments in the version that is searched, of all parts."""
        return sum(segments for segments, _ in self._sizes.values())

    @property
    def num_files(self) -> int:
        """Number of files in the version that is searched."""
        version, files = self._num_files
        if version != self._version:  # a film may be in several parts
            version, files = self._version, self._ask(lambda shards: len(shards.films()))
            if not self._lost:
                self._num_files = version, files
        return files

    def refresh(self) -> bool:
        """Has all parts load the latest version, and then searches it."""
        with self._refreshing:
            has_new_text = self._passages.refresh()
            version = self._store.version()
            has_new_segments = version != self._version
            if has_new_segments:
                self._sizes |= self._load(version)
                self._version = version
            if self._calibration.version != self._version:  # saved after the segments
                self._calibration = self._store.calibration()
            return has_new_segments or has_new_text

    def close(self) -> None:
        """Stops trying to reach lost parts."""
        self._closed.set()

    def _load(self, version: int) -> dict[int, tuple[int, int]]:
        """Has the parts load a version, and returns their sizes. Others become lost."""
        parts = RemoteParts(self._handles, version)
        numbers = [n for n in range(parts.count) if n not in self._lost]
        sizes, lost = parts.call("load", dict.fromkeys(numbers, (version,)), wait=LOAD_SECONDS)
        self._lose(lost)
        return sizes

    def _ask(self, function: Callable[[Shards], T]) -> T:
        """Calls a function with the version that is searched, without the parts that are lost."""
        dropped = set[int]()  # not asked again by this call, even if they answer again
        while True:
            lost = frozenset(self._lost | dropped)
            if len(lost) == len(self._handles):
                raise UnavailableError("no shard of the index answers: try again in some seconds")
            parts = RemoteParts(self._handles, self._version)
            try:
                result: Any = function(Shards(parts, lost))
            except LostError as error:
                self._lose(error.numbers)
                dropped |= error.numbers
                continue
            except UnavailableError:
                raise
            except InputError:  # the files of this version may be deleted
                if self._refreshing.locked() or not self.refresh():
                    raise
                continue
            return _mark(result, len(lost)) if lost else result

    def _lose(self, numbers: Collection[int]) -> None:
        """Stops asking parts until they answer again."""
        with self._losing:
            new = sorted(set(numbers) - self._lost)
            self._lost |= set(new)
        for number in new:
            name = f"shard {number + 1} of {len(self._handles)}"
            logging.warning("%s of the index does not answer", name)
            threading.Thread(target=self._recover, args=(number, name), daemon=True).start()

    def _recover(self, number: int, name: str) -> None:
        """Waits for a part to answer, and asks it again from then on."""
        pause, reported = RETRY_SECONDS, ""
        while not self._closed.wait(pause):
            version = self._version
            try:
                call = self._handles[number].load.remote(version)
                self._sizes[number] = call.result(timeout_s=LOAD_SECONDS)
            except Exception as error:  # Ray's errors have no common type
                if (reason := first_line(error)) != reported:
                    problem = f"cannot be reached: {type(error).__name__}: {reason}"
                    logging.warning("%s of the index %s", name, problem)
                pause, reported = min(2 * pause, MAX_RETRY_SECONDS), reason
                continue
            if version == self._version:
                self._lost.discard(number)
                logging.warning("%s of the index answers again", name)
                return


def _mark(result: Any, missing: int) -> Any:
    """Returns answers with the number of missing parts, anything else as it is."""
    if isinstance(result, Answer):
        return dataclasses.replace(result, missing=missing)
    if isinstance(result, list):
        return [_mark(one, missing) for one in result]
    return result


class RemoteParts(Parts):
    """The parts of one version of an index, in processes of a Ray cluster."""

    def __init__(self, handles: list[Any], version: int) -> None:
        self.count, self._handles, self._version = len(handles), handles, version

    def ask(self, method: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Calls a method of `Shard` in parts, or raises LostError if one does not answer."""
        asked = {number: (self._version, method, some) for number, some in arguments.items()}
        answers, lost = self.call("ask", asked, wait=WAIT_SECONDS)
        if lost:
            raise LostError(lost)
        return answers

    def call(
        self, method: str, arguments: dict[int, tuple[Any, ...]], *, wait: float
    ) -> tuple[dict[int, Any], set[int]]:
        """Calls a method of `ShardServer` in parts, and raises what it raises in one of them.

        Returns the results by number, and the parts that are lost: those whose process has ended,
        or does not answer. A part that computes may take as long as `wait` seconds.
        """
        if not arguments:
            return {}, set()
        with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
            pending = {
                pool.submit(self._call_one, number, method, some, wait): number
                for number, some in arguments.items()
            }
            results = {
                pending[call]: call.result() for call in concurrent.futures.as_completed(pending)
            }
        lost = {number for number, result in results.items() if result is _LOST}
        return {n: result for n, result in results.items() if n not in lost}, lost

    def _call_one(self, number: int, method: str, arguments: tuple[Any, ...], wait: float) -> Any:
        """Returns the result of a part, or _LOST."""
        from ray.exceptions import RayTaskError

        handle, limit = self._handles[number], time.monotonic() + wait
        try:
            call = getattr(handle, method).remote(*arguments)
            while True:
                try:
                    return call.result(timeout_s=ASK_SECONDS)
                except TimeoutError:
                    handle.ping.remote().result(timeout_s=PING_SECONDS)
                    if time.monotonic() > limit:
                        return _LOST
        except RayTaskError as error:
            raise error.cause from None
        except Exception:  # Ray's errors of lost processes have no common type
            logging.getLogger(__name__).debug("shard %d", number, exc_info=True)
            return _LOST


@contextlib.contextmanager
def open_sharded(
    location: PathLike,
    count: int,
    *,
    address: str | None = None,
    model: PathLike | None = None,
    candidates: int = 5000,
    rerank: int = 200,
) -> Iterator[ShardedIndex]:
    """Starts the parts of an index on a Ray cluster, yields the index, then stops them.

    Args:
        location, model, candidates, rerank: see `xclip_jax.search.Index.open`. All machines must
            have the index and the model at the same place.
        count: number of parts, at least 1.
        address: of a running cluster; None: a new one on this machine.

    Raises:
        InputError: Ray is not installed, the cluster cannot be reached, or a part cannot start.
    """
    try:
        import ray
        from ray import serve
    except ImportError:
        raise InputError("--shards requires Ray: run pip install -e '.[ray]'") from None
    options: Any = {"model": model, "candidates": candidates, "rerank": rerank}
    if not exists(location):
        Store(location)  # raises
    _connect(address, count)  # first: it forks, and Lance has threads
    store, index, sign = Store(location), None, None
    front = f"xclip_jax-{uuid.uuid4().hex}"
    names = [f"{front}-{number}" for number in range(count)]
    try:
        sign = _show_life(ray, front)
        _delete_orphans(ray, serve)
        _warn_of_few_cpus(ray, count)
        source = store.location, model or store.about["model"]
        index = ShardedIndex(store, lambda: _deploy(serve, names, *source), **options)
        yield index
    finally:
        if index:
            index.close()
        with contextlib.suppress(Exception):  # the cluster may have stopped
            for one in names if address else []:
                serve.delete(one, _blocking=False)
        del sign
        ray.shutdown()


def _connect(address: str | None, count: int) -> None:
    """Connects to a cluster, or starts one with a processor for each part."""
    if address is None:
        connect(f"--shards={count}", "local", include_dashboard=False, num_cpus=count + 1)
    else:
        connect(f"--ray={address}", address)


def _show_life(ray: Any, front: str) -> Any:
    """Starts an actor with the name of the front end, which ends with it or when it is deleted.

    It is started again if it loses its machine.
    """
    kind = type("FrontEnd", (), {})  # without a module, which the actor would import
    options: Any = {"num_cpus": 0, "max_restarts": -1, "name": front, "namespace": _NAMESPACE}
    return ray.remote(kind).options(**options).remote()


def _delete_orphans(ray: Any, serve: Any) -> None:
    """Deletes the parts of front ends that have ended without doing so."""
    for name in serve.status().applications:
        front, _, number = name.rpartition("-")
        if re.fullmatch(r"xclip_jax-[0-9a-f]{32}", front) and number.isdecimal():
            try:
                ray.get_actor(front, _NAMESPACE)
            except ValueError:
                serve.delete(name, _blocking=False)


def _warn_of_few_cpus(ray: Any, count: int) -> None:
    """Prints that the parts wait if the cluster, which may be growing, has too few CPUs."""
    free = int(ray.available_resources().get("CPU", 0))
    if free < count:
        print(f"waiting: {count} shards need a CPU each, {free} are free", file=sys.stderr)


def _deploy(serve: Any, names: Sequence[str], location: str, model: PathLike) -> list[Any]:
    """Starts parts by their names, and returns their handles. A process that ends is replaced."""
    options: Any = {"num_cpus": 1, "runtime_env": {"env_vars": ENVIRONMENT}}
    targets = []
    for number, name in enumerate(names):
        deployment = serve.deployment(
            ShardServer,
            name=name,
            ray_actor_options=options,
            max_ongoing_requests=64,
            health_check_period_s=1,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=1,
        )
        application = deployment.bind(location, os.path.abspath(model), Part(number, len(names)))
        targets.append(serve.RunTarget(application, name=name, route_prefix=None))
    logging.disable(logging.INFO)  # Serve reports each step
    try:
        serve.start(proxy_location="Disabled")
        return serve.run_many(targets)
    except Exception as error:  # Ray's have no common type
        reason = _find_reason(serve, names) or first_line(error)
        raise InputError(f"the shards of {location} could not start: {reason}") from None
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it reports in a thread of its own


def _find_reason(serve: Any, names: Sequence[str]) -> str:
    """Returns the last line of what a part has raised, or ""."""
    with contextlib.suppress(Exception):  # the cluster may have failed
        applications = serve.status().applications
        messages = [d.message for name in names for d in applications[name].deployments.values()]
        traceback = next(text for text in messages if "Traceback" in text)
        return traceback.splitlines()[-1].removeprefix("xclip_jax.cli.InputError: ")
    return ""
