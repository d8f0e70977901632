"""Encodes bundles of files in worker processes, which write the rows beside the index.

The process that has started the workers commits what they have written.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypedDict

from xclip_jax.cli import InputError
from xclip_jax.inference import copy_to_local_devices
from xclip_jax.retriever import load
from xclip_jax.search.encoding import Encoder, FileReport, Row, fingerprint, sort_by_hash
from xclip_jax.search.store import FileStamp, Store
from xclip_jax.workers import Function, run_jobs

# Lost if a worker is killed.
MAX_FILES, MAX_BYTES = 32, 4 * 10**9
_BUNDLES_PER_SLOT = 4  # so that all workers end at about the same time


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Files that a worker reads and encodes, and the index that they are for."""

    location: str
    model: str  # folder
    about: str  # settings of the index as JSON
    stamps: dict[str, FileStamp]  # of each path

    def split(self) -> list["Bundle"]:
        """Returns a bundle for each file."""
        stamps = ({path: stamp} for path, stamp in self.stamps.items())
        return [dataclasses.replace(self, stamps=one) for one in stamps]


class BundleResult(TypedDict):
    """Rows and files of a bundle, as JSON."""

    fragments: list[dict[str, Any]]  # see Store.append
    reports: list[list[Any]]  # the fields of a FileReport each


def make_bundles(
    store: Store, stamps: Mapping[str, FileStamp], slots: int | None, model: str
) -> list[Bundle]:
    """Shares files out by a hash of their paths.

    `slots` is the number of bundles that are encoded at the same time, None if it is unknown.
    """
    parts = (slots or 0) * _BUNDLES_PER_SLOT or 1
    max_files = min(MAX_FILES, math.ceil(len(stamps) / parts))
    max_bytes = min(MAX_BYTES, math.ceil(sum(size for size, _ in stamps.values()) / parts))
    groups: list[dict[str, FileStamp]] = [{}]
    total = 0
    for path in sort_by_hash(stamps):
        size = stamps[path][0]
        if groups[-1] and (len(groups[-1]) == max_files or total + size > max_bytes):
            groups.append({})
            total = 0
        groups[-1][path] = stamps[path]
        total += size
    about = json.dumps(store.about)
    return [Bundle(store.location, model, about, group) for group in groups]


def encode_bundle(bundle: Bundle, threads: int | None = 1) -> BundleResult:
    """Reads and encodes the files of a bundle, and writes their rows as fragments.

    Args:
        bundle: the files.
        threads: number of files that are decoded at the same time; None: in processes of their
            own, one per core, so that a file which crashes its decoder does not end this process.
    """
    store, encoder = _open(bundle.location, bundle.model, bundle.about)
    run = run_jobs if threads is None else functools.partial(_run_in_threads, threads=threads)
    reports: list[FileReport] = []
    rows: list[Row] = []

    def done(report: FileReport, new_rows: list[Row]) -> None:
        reports.append(report)
        rows.extend(new_rows)

    encoder.read(bundle.stamps, run, done)
    fragments = store.write_fragments(rows) if rows else []
    return {"fragments": fragments, "reports": [list(vars(one).values()) for one in reports]}


@functools.lru_cache(maxsize=1)
def _open(location: str, model: str, about: str) -> tuple[Store, Encoder]:
    """Opens an index and loads its model once per process."""
    store, retriever = Store(location), load(model)
    if json.dumps(store.about) != about:
        raise InputError(f"{location} is another index on a worker than where it was started")
    actual, expected = fingerprint(retriever), store.about["fingerprint"]
    if actual != expected:
        raise InputError(f"{model} is another model on a worker ({actual}, not {expected})")
    retriever.params = copy_to_local_devices(retriever.params)
    return store, Encoder(retriever, store.about, store.bank())


def _run_in_threads(
    function: Function, jobs: Sequence[Any], done: Callable[[int, Any], Any], *, threads: int
) -> None:
    """Calls `function` on every job in threads, which read ahead, and `done` in this one."""
    waiting = list(enumerate(jobs))[::-1]
    running: dict[Future, int] = {}
    with ThreadPoolExecutor(threads) as pool:
        while waiting or running:
            while waiting and len(running) <= threads:
                index, job = waiting.pop()
                running[pool.submit(function, job)] = index
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                done(running.pop(future), future.result())
