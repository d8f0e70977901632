"""Serves an index from many processes or machines: its shards by Ray Serve, one front end.

The front end encodes a sentence once, asks all shards in each stage, and merges by score. It says
when a shard did not answer. See https://docs.ray.io/en/latest/serve.
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

ASK_SECONDS = 1.0  # after which a shard must show that it lives
PING_SECONDS = 0.4  # in which it must show this
WAIT_SECONDS = 120.0  # for the answer of a shard that lives, e.g. reads frames from a bucket
LOAD_SECONDS = 3600.0  # in which a shard must have loaded a version
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.5, 5.0  # between attempts to reach a lost shard
ORPHAN_SECONDS = 5.0  # between searches for the shards of other front ends that have ended
_LOST = object()  # result of a shard that does not answer
_NAMESPACE = "xclip_jax"  # of the actors of front ends
# Of the shards: they compute as one process without a GPU does.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}


class ShardedIndex(Searcher):
    """An index whose segments are held by processes of a Ray cluster.

    Attributes are those of `Searcher`.
    """

    concurrency = 8

    def __init__(self, store: Store, deploy: Callable[[], list[Any]], **options: Any) -> None:
        """Opens an index. `deploy` starts its shards and returns Ray Serve's handles of them."""
        super().__init__(store, **options)
        self.retriever  # noqa: B018  (a wrong model must fail before it is loaded by all shards)
        self._handles, self._lost = deploy(), set[int]()
        self._refreshing, self._losing = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._version, self._sizes, self._num_files = 0, dict[int, tuple[int, int]](), (0, 0)
        self.refresh()
        empty = sum(not segments for segments, _ in self._sizes.values())
        if empty and self.num_segments:
            name = f"{empty} of {len(self._handles)} shards"
            logging.warning("%s hold no segment of this small index: use fewer", name)

    @property
    def num_segments(self) -> int:
        """Number of segments in the version that is searched, of all shards."""
        return sum(segments for segments, _ in self._sizes.values())

    @property
    def num_files(self) -> int:
        """Number of files in the version that is searched."""
        version, files = self._num_files
        if version != self._version:  # a film may be in several shards
            version, files = self._version, self._ask(lambda shards: len(shards.films()))
            if not self._lost:
                self._num_files = version, files
        return files

    def refresh(self) -> bool:
        """Has all shards load the latest version, and then searches it."""
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
        """Stops trying to reach lost shards."""
        self._closed.set()

    def _load(self, version: int) -> dict[int, tuple[int, int]]:
        """Has the shards load a version, and returns their sizes. Others become lost."""
        parts = RemoteParts(self._handles, version)
        numbers = [n for n in range(parts.count) if n not in self._lost]
        sizes, lost = parts.call("load", dict.fromkeys(numbers, (version,)), wait=LOAD_SECONDS)
        self._lose(lost)
        return sizes

    def _ask(self, function: Callable[[Shards], T]) -> T:
        """Calls a function with the version that is searched, without the shards that are lost."""
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
        """Stops asking shards until they answer again."""
        with self._losing:
            new = sorted(set(numbers) - self._lost)
            self._lost |= set(new)
        for number in new:
            name = f"shard {number + 1} of {len(self._handles)}"
            logging.warning("%s of the index does not answer", name)
            threading.Thread(target=self._recover, args=(number, name), daemon=True).start()

    def _recover(self, number: int, name: str) -> None:
        """Waits for a shard to answer, and asks it again from then on."""
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
    """Returns answers with the number of missing shards, anything else as it is."""
    if isinstance(result, Answer):
        return dataclasses.replace(result, missing=missing)
    if isinstance(result, list):
        return [_mark(one, missing) for one in result]
    return result


class RemoteParts(Parts):
    """The shards of one version of an index, in processes of a Ray cluster."""

    def __init__(self, handles: list[Any], version: int) -> None:
        self.count, self._handles, self._version = len(handles), handles, version

    def ask(self, method: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Calls a method of `Shard` in shards, or raises LostError if one does not answer."""
        asked = {number: (self._version, method, some) for number, some in arguments.items()}
        answers, lost = self.call("ask", asked, wait=WAIT_SECONDS)
        if lost:
            raise LostError(lost)
        return answers

    def call(
        self, method: str, arguments: dict[int, tuple[Any, ...]], *, wait: float
    ) -> tuple[dict[int, Any], set[int]]:
        """Calls a method of `ShardServer` in shards, and raises what it raises in one of them.

        Returns the results by number, and the shards that are lost: those whose process has ended,
        or does not answer. A shard that computes may take as long as `wait` seconds.
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
        """Returns the result of a shard, or _LOST."""
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
    """Starts the shards of an index on a Ray cluster, yields the index, then stops them.

    Args:
        location, model, candidates, rerank: see `xclip_jax.search.Index.open`. All machines must
            have the index and the model at the same place.
        count: number of shards, at least 1.
        address: of a running cluster; None: a new one on this machine.

    Raises:
        InputError: Ray is not installed, the cluster cannot be reached, or a shard cannot start.
    """
    try:
        import ray
        from ray import serve
    except ImportError:
        raise InputError("--shards requires Ray: run pip install -e '.[ray]'") from None
    options: Any = {"model": model, "candidates": candidates, "rerank": rerank}
    if not exists(location):
        Store(location)  # raises
    front = f"xclip_jax-{uuid.uuid4().hex}"
    names = [f"{front}-{number}" for number in range(count)]
    with contextlib.ExitStack() as stack:
        _connect(address, count)  # first: it forks, and Lance has threads
        stack.callback(ray.shutdown)
        store, marker = Store(location), _mark_alive(ray, front, count)
        stack.callback(_end, ray, serve, marker, names if address else [])
        stack.enter_context(_deleting_orphans(ray, serve))
        source = store.location, model or store.about["model"]
        index = ShardedIndex(store, lambda: _deploy(serve, names, *source), **options)
        yield stack.enter_context(contextlib.closing(index))


def _connect(address: str | None, count: int) -> None:
    """Connects to a cluster, or starts one with a processor for each shard."""
    import ray

    if ray.is_initialized():  # it would be disconnected at the end
        raise InputError(f"--shards={count}: this process is connected to a Ray cluster already")
    if address is None:
        connect(f"--shards={count}", "local", include_dashboard=False, num_cpus=count + 1)
    else:
        connect(f"--ray={address}", address)


def _mark_alive(ray: Any, front: str, count: int) -> Any:
    """Starts a named actor that lives as long as this front end, and returns its handle.

    By it, other front ends can tell whether this one is running. Ray starts it again if the actor's
    machine fails. A cluster with too few CPUs is reported, as it may be growing.
    """
    kind = type("FrontEnd", (), {})  # pickled by value, as no module has it: it imports nothing
    options: Any = {"num_cpus": 0, "max_restarts": -1, "name": front, "namespace": _NAMESPACE}
    try:
        marker = ray.remote(kind).options(**options).remote()
        free = int(ray.available_resources().get("CPU", 0))
    except Exception as error:  # Ray has no common type
        raise InputError(f"--shards={count}: the Ray cluster failed: {first_line(error)}") from None
    if free < count:
        print(f"waiting: {count} shards need a CPU each, {free} are free", file=sys.stderr)
    return marker


def _end(ray: Any, serve: Any, marker: Any, names: Sequence[str]) -> None:
    """Deletes shards, and ends the actor of `_mark_alive`."""
    with contextlib.suppress(Exception):  # the cluster may have stopped
        for one in names:
            serve.delete(one, _blocking=False)
        ray.kill(marker)


@contextlib.contextmanager
def _deleting_orphans(ray: Any, serve: Any) -> Iterator[None]:
    """Deletes the shards of front ends that have ended without doing so, at intervals.

    Ray takes up to a minute to notice that a machine or a client is lost.
    """
    stopped = threading.Event()

    def run() -> None:
        while True:
            with contextlib.suppress(Exception):  # the cluster may have stopped
                _delete_orphans(ray, serve)
            if stopped.wait(ORPHAN_SECONDS):
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()  # after a shutdown, it would start a cluster


def _delete_orphans(ray: Any, serve: Any) -> None:
    """Deletes the shards whose front end has no actor any more."""
    for name in serve.status().applications:
        front, _, number = name.rpartition("-")
        if re.fullmatch(r"xclip_jax-[0-9a-f]{32}", front) and number.isdecimal():
            try:
                ray.get_actor(front, _NAMESPACE)
            except ValueError:
                serve.delete(name, _blocking=False)


def _deploy(serve: Any, names: Sequence[str], location: str, model: PathLike) -> list[Any]:
    """Starts shards by their names, and returns their handles. A process that ends is replaced."""
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
    """Returns the last line of what a shard has raised, or ""."""
    with contextlib.suppress(Exception):  # the cluster may have failed
        applications = serve.status().applications
        messages = [d.message for name in names for d in applications[name].deployments.values()]
        traceback = next(text for text in messages if "Traceback" in text)
        return re.sub(r"^xclip_jax[\w.]*Error: ", "", traceback.splitlines()[-1])
    return ""
