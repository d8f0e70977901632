"""Updates an index from folders of videos: encodes the segments of changed files."""

import contextlib
import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from xclip_jax.cli import InputError, PathLike, progress
from xclip_jax.data.extraction import VideoFolder
from xclip_jax.retriever import Retriever
from xclip_jax.search.backends import Distribution, Workers, parse_distribution
from xclip_jax.search.bundles import Bundle, BundleResult, encode_bundle, make_bundles
from xclip_jax.search.encoding import Encoder, FileReport, Row, fingerprint
from xclip_jax.search.job_array import ArrayShard, BusyError, lock_files
from xclip_jax.search.store import FileStamp, Store
from xclip_jax.search.timed_text import TextReader, add_texts
from xclip_jax.workers import run_jobs

__all__ = ["BusyError", "IndexingSummary", "add_files", "find_videos", "fingerprint", "is_below"]

HIDING = "missing, empty or not readable: what the index holds of it stays"
NAME_NOT_UTF8 = "the file name is not UTF-8"
WORKERS_CRASHED = "each worker that read this file crashed"
# Each commit adds a file that readers must open, so commits become rarer as a run gets longer.
MIN_COMMIT_SECONDS = 5
COMMIT_FRACTION = 0.02  # minimum time between commits, as a fraction of the run's time so far


@dataclasses.dataclass
class IndexingSummary:
    """Numbers of files and problems of one update of an index."""

    files: int = 0  # read and added
    segments: int = 0  # added
    unchanged: int = 0  # in the index already
    removed: int = 0  # whose outdated or missing version was removed
    texts: int = 0  # whose subtitles, speech or text on screen was read, and is not empty
    # {path: reason}, including unchanged files that could not be read before
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)
    # {path: reason} of files that were only partly read
    partial: dict[str, str] = dataclasses.field(default_factory=dict)


def add_files(
    store: Store,
    retriever: Retriever,
    videos: Sequence[PathLike],
    *,
    readers: Sequence[TextReader] = (),
    prune: bool = False,
    corrupted: Iterable[str] = (),
    model: str = "",
    **distribution: Unpack[Distribution],
) -> IndexingSummary:
    """Adds new and changed files to the index, and then their text by `readers`.

    See `xclip_jax.search.Index.add`. Files of `corrupted` are read again. Workers load the model of
    the folder `model`. Raises BusyError if another process is adding files.
    """
    shard, workers = parse_distribution(store.location, **distribution)
    paths, unlisted = find_videos(videos, allow_none=prune)
    summary = IndexingSummary(unreadable=unlisted)
    if store.about["shots"] and importlib.util.find_spec("scenedetect") is None:
        raise InputError("--shots requires scenedetect: run pip install -e '.[shots]'")
    with lock_files(store.location, shard):
        store.remove(dict.fromkeys(path for path in sorted(corrupted) if path in shard))
        indexed = store.files()
        stamps = _read_stamps(paths, indexed, summary)
        if prune:
            _remove_missing(store, videos, [p for p in indexed if p not in stamps], shard, summary)
        stamps = {path: stamp for path, stamp in stamps.items() if path in shard}
        new = {path: stamp for path, stamp in stamps.items() if stamp not in indexed.get(path, ())}
        unchanged = {path: stamp for path, stamp in stamps.items() if path not in new}
        # A killed run may have left the outdated version of a file beside the new one.
        store.remove({path: stamp for path, stamp in unchanged.items() if len(indexed[path]) > 1})
        reasons = {path: indexed[path][stamp] for path, stamp in unchanged.items()}
        summary.unreadable |= {path: reason for path, reason in reasons.items() if reason}
        summary.unchanged = sum(not reason for reason in reasons.values())
        if new and workers is None:
            _read_here(_Commits(store, new, set(indexed), summary, write=store.add), retriever)
        elif new and workers is not None:
            commits = _Commits(store, new, set(indexed), summary, write=store.append)
            _read_on_workers(commits, workers, model)
        summary.texts = add_texts(store, stamps, readers, summary.partial)
        store.compact()
    return summary


def _remove_missing(
    store: Store,
    videos: Sequence[PathLike],
    unseen: Sequence[str],
    shard: ArrayShard,
    summary: IndexingSummary,
) -> None:
    """Removes the files of a shard that were not found, unless their folder may hide them."""
    missing = [path for path in unseen if path in shard and is_below(path, videos)]
    given = {os.path.abspath(video) for video in videos}
    folders = {path: find_hiding_folder(path, given) for path in missing}
    deleted = [path for path, folder in folders.items() if folder is None]
    store.remove(dict.fromkeys(deleted))
    summary.removed = len(deleted)
    summary.unreadable |= {folder: HIDING for folder in folders.values() if folder}


def _read_stamps(
    paths: Iterable[str], indexed: Iterable[str], summary: IndexingSummary
) -> dict[str, FileStamp]:
    """Returns {path: stamp} of files, each of which occurs once.

    Of several names of a file (links, linked folders) it is the one in the index, else the first.
    """
    stamps: dict[str, FileStamp] = {}
    known: dict[tuple[int, int], str] = {}  # device and number of a file -> path
    for path in indexed:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            known.setdefault((status.st_dev, status.st_ino), path)
    for path in sorted(paths, key=lambda path: (path != os.path.realpath(path), path)):
        if path != path.encode("utf-8", "replace").decode():  # on Linux, names may be any bytes
            summary.unreadable[path] = NAME_NOT_UTF8
            continue
        with contextlib.suppress(FileNotFoundError):  # deleted since it was found
            status = os.stat(path)
            name = known.setdefault((status.st_dev, status.st_ino), path)
            stamps[name] = status.st_size, status.st_mtime_ns
    return stamps


def find_hiding_folder(path: str, given: Container[str] = ()) -> str | None:
    """Returns the folder that may hide a missing file, or None if the file was deleted.

    A folder that cannot be listed may hold the file, an empty one may be the mount point of a share
    that is offline, and a link without target may lead to one. So may a missing folder that the
    user named: its absolute path is in `given`.
    """
    if os.path.islink(path):
        return path
    for folder in Path(path).parents:
        try:
            is_complete = os.listdir(folder) and os.access(folder, os.X_OK)
            return None if is_complete else str(folder)
        except (FileNotFoundError, NotADirectoryError):
            if folder.is_symlink() or str(folder) in given:
                return str(folder)
        except OSError:
            return str(folder)
    return None


def find_videos(
    videos: Iterable[PathLike], *, allow_none: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Returns the sorted absolute paths of files and of the video files in folders, recursively.

    Returns also {folder: reason why it cannot be listed}. Raises InputError for a missing path or
    no video at all, unless `allow_none`.
    """
    paths, unlisted = set(), {}
    for video in videos:
        if os.path.isdir(video):
            with contextlib.suppress(InputError):  # one of several folders may be empty
                folder = VideoFolder(os.path.abspath(video))
                paths.update(map(str, folder.files))
                unlisted |= folder.unlisted
        elif os.path.isfile(video):
            paths.add(os.path.abspath(video))
        elif not allow_none:
            raise InputError(f"no such file or folder of videos: {video}")
    if not paths and not allow_none:
        raise InputError(f"no video files in {', '.join(map(str, videos))}")
    return sorted(paths), unlisted


@dataclasses.dataclass
class _Commits:
    """Commits the files that were read, at intervals, and removes their outdated versions."""

    store: Store
    stamps: Mapping[str, FileStamp]  # of the files to read
    indexed: set[str]  # paths that have an older version in the index
    summary: IndexingSummary
    write: Callable[[list[Any], list[Row]], None]  # commits segments and unreadable files

    def __post_init__(self) -> None:
        self.segments: list[Any] = []  # to commit: rows, or the fragments of workers
        self.failed: list[Row] = []  # unreadable files to commit
        self.paths: set[str] = set()  # of `segments`
        self.start_time = self.commit_time = time.monotonic()

    def add(self, reports: Iterable[FileReport], segments: Iterable[Any]) -> None:
        """Queues complete files, and commits at intervals."""
        self.segments += segments  # first: a file without its rows would replace an older version
        for report in reports:
            if report.problem:
                problems = self.summary.partial if report.segments else self.summary.unreadable
                problems[report.path] = report.problem
            if report.segments:
                self.paths.add(report.path)
            elif not report.retry:
                size, mtime = self.stamps[report.path]
                row = {"path": report.path, "size": size, "mtime": mtime}
                self.failed.append({**row, "reason": report.problem})
            self.summary.segments += report.segments
        now = time.monotonic()
        interval = max(MIN_COMMIT_SECONDS, COMMIT_FRACTION * (now - self.start_time))
        if now - self.commit_time > interval:
            self.commit()

    def commit(self) -> None:
        """Commits all files of the queue, then removes their outdated versions."""
        segments, failed, paths = self.segments, self.failed, self.paths
        # Emptied first: what is interrupted here is not committed twice.
        self.segments, self.failed, self.paths = [], [], set()
        self.write(segments, failed)
        written = paths | {row["path"] for row in failed}
        changed = {path: self.stamps[path] for path in sorted(written & self.indexed)}
        self.store.remove(changed)
        self.summary.removed += len(changed)
        self.summary.files += len(paths)
        self.commit_time = time.monotonic()


@contextlib.contextmanager
def _progress(commits: _Commits) -> Iterator[Callable[[str], None]]:
    """Shows how much of the files was read, yields a function to call with each path."""
    summary = commits.summary
    with progress(sum(size for size, _ in commits.stamps.values()), "indexing", "B") as bar:

        def update(path: str) -> None:
            bar.update(commits.stamps[path][0])
            counts = {"segments": summary.segments, "failed": len(summary.unreadable)}
            bar.set_postfix(counts, refresh=False)

        try:
            yield update
        except KeyboardInterrupt:
            commits.commit()  # what was read since the last one
            raise
        commits.commit()
        bar.set_postfix(segments=summary.segments, failed=len(summary.unreadable))


def _read_here(commits: _Commits, retriever: Retriever) -> None:
    """Reads files in processes of this machine, and encodes them in this process."""
    encoder = Encoder(retriever, commits.store.about, commits.store.bank())

    def done(report: FileReport, rows: list[Row]) -> None:
        commits.add([report], rows)

    with _progress(commits) as update:
        encoder.read(commits.stamps, run_jobs, done, when_read=update)


def _read_on_workers(commits: _Commits, workers: Workers, model: str) -> None:
    """Reads and encodes files on workers, and commits the fragments that they write."""
    bundles = make_bundles(commits.store, commits.stamps, workers.slots, model)
    with _progress(commits) as update:
        while bundles:
            bundles = _read_bundles(commits, workers, bundles, update)


def _read_bundles(
    commits: _Commits, workers: Workers, bundles: Sequence[Bundle], update: Callable[[str], None]
) -> list[Bundle]:
    """Returns the bundles that crashed their workers, split into one for each file.

    A file that crashes them again is reported.
    """
    remaining = dict(enumerate(bundles))
    crashed: list[Bundle] = []

    def done(index: int, result: BundleResult | None) -> None:
        if (bundle := remaining.pop(index, None)) is None:  # a worker that was believed lost
            return
        if result is None and len(bundle.stamps) > 1:
            crashed.extend(bundle.split())
            return
        result = result or {
            "fragments": [],
            "reports": [[*bundle.stamps, 0, WORKERS_CRASHED, True]],
        }
        reports = [FileReport(*fields) for fields in result["reports"]]
        commits.add(reports, result["fragments"])
        for report in reports:
            update(report.path)

    workers.run(encode_bundle, bundles, done)
    return crashed


def is_below(path: str, videos: Iterable[PathLike]) -> bool:
    """Returns True if `path` is one of these files or is inside one of these folders.

    Files of a linked folder may be indexed by the names that they have without the link.
    """
    names = {name for video in videos for name in (os.path.abspath(video), os.path.realpath(video))}
    return any(Path(path).is_relative_to(name) for name in names)
