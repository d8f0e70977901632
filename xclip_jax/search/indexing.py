"""Updates an index from folders of videos: reads, encodes and commits changed files."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import UInt8

from xclip_jax.cli import InputError, progress
from xclip_jax.data.extraction import CRASHED, VideoFolder
from xclip_jax.inference import encode_videos
from xclip_jax.retriever import Retriever
from xclip_jax.search.segments import (
    SegmentedFile,
    SegmentJob,
    load_frames,
    read_segments,
    require_scenedetect,
)
from xclip_jax.search.store import FileStamp, Store
from xclip_jax.workers import run_jobs

Row = dict[str, Any]  # column -> value
NAME_NOT_UTF8 = "the file name is not UTF-8"
# Each commit adds a file that readers must open, so commits become rarer as a run gets longer.
MIN_COMMIT_SECONDS = 5
COMMIT_FRACTION = 0.02  # minimum time between commits, as a fraction of the run's time so far


@dataclasses.dataclass
class IndexingSummary:
    """Counts and problems of one update of an index.

    Attributes:
        files, segments: number read and added.
        unchanged: number of files that were in the index already.
        removed: number of files whose outdated or missing version was removed.
        unreadable: {path: reason}, including unchanged files that could not be read before.
        partial: {path: reason} of files that were only partly read.
    """

    files: int = 0
    segments: int = 0
    unchanged: int = 0
    removed: int = 0
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)
    partial: dict[str, str] = dataclasses.field(default_factory=dict)


def add_files(
    store: Store, retriever: Retriever, videos: Sequence[str | os.PathLike], *, prune: bool = False
) -> IndexingSummary:
    """Adds new and changed files to the index, see `xclip_jax.search.Index.add`."""
    paths = find_videos(videos, allow_none=prune)
    if store.about["shots"]:
        require_scenedetect()
    with _writer_lock(store), _frames_folder() as folder:
        summary = IndexingSummary()
        summary.unreadable = {path: NAME_NOT_UTF8 for path in paths if not _is_utf8(path)}
        stamps = {path: stamp for path in paths if _is_utf8(path) and (stamp := _stamp(path))}
        indexed = store.files()
        if prune:
            missing = [path for path in indexed if path not in stamps and is_below(path, videos)]
            store.remove(missing)
            summary.removed = len(missing)
        unchanged = [path for path, stamp in stamps.items() if stamp in indexed.get(path, ())]
        # A killed run may have left the outdated version of a file beside the new one.
        store.remove_outdated({path: stamps[path] for path in unchanged if len(indexed[path]) > 1})
        reasons = store.unreadable()
        summary.unreadable |= {path: reasons[path] for path in unchanged if path in reasons}
        summary.unchanged = sum(path not in reasons for path in unchanged)
        new = {path: stamp for path, stamp in stamps.items() if stamp not in indexed.get(path, ())}
        if new:
            _Writer(store, retriever, new, set(indexed), summary).run(folder)
        store.compact()
    return summary


def find_videos(videos: Iterable[str | os.PathLike], *, allow_none: bool = False) -> list[str]:
    """Returns the sorted absolute paths of files and of the video files in folders, recursively.

    Raises:
        InputError: a path does not exist, or there is no video and `allow_none` is False.
    """
    paths = set()
    for video in videos:
        if os.path.isdir(video):
            with contextlib.suppress(InputError):  # one of several folders may be empty
                paths.update(os.path.abspath(path) for path in VideoFolder(video).files)
        elif os.path.isfile(video):
            paths.add(os.path.abspath(video))
        elif not allow_none:
            raise InputError(f"no such file or folder of videos: {video}")
    if not paths and not allow_none:
        raise InputError(f"no video files in {', '.join(map(str, videos))}")
    return sorted(paths)


@dataclasses.dataclass
class _Writer:
    """Reads files in worker processes, encodes segments in batches, commits complete files."""

    store: Store
    retriever: Retriever
    stamps: Mapping[str, FileStamp]
    outdated: set[str]  # paths that may have an older version in the index
    summary: IndexingSummary

    def __post_init__(self) -> None:
        self.batch: list[tuple[Row, UInt8[np.ndarray, "F S S 3"]]] = []  # not encoded
        self.encoded: list[Row] = []  # to commit
        self.failed: list[Row] = []  # unreadable files to commit
        self.missing: dict[str, int] = {}  # path -> segments that are not encoded yet
        self.start_time = self.commit_time = time.monotonic()
        self.batch_size = (4 if jax.default_backend() == "cpu" else 64) * jax.local_device_count()

    def run(self, folder: Path) -> None:
        """Indexes all files of `stamps`, with `folder` for the frames of files being read."""
        model, about = self.retriever.model, self.store.about
        jobs = [
            SegmentJob(
                path=path,
                frames_file=folder / str(number),
                image_size=model.config.vision.image_size,
                max_frames=model.config.max_frames,
                segment_seconds=about["segment_seconds"],
                shots=about["shots"],
            )
            for number, path in enumerate(self.stamps)
        ]
        sizes = [size for size, _ in self.stamps.values()]
        with progress(sum(sizes), "indexing", "B") as bar:

            def done(index: int, result: SegmentedFile | None) -> None:
                self.add(jobs[index], result or SegmentedFile([], failure=CRASHED))
                jobs[index].frames_file.unlink(missing_ok=True)
                bar.update(sizes[index])
                counts = {"segments": self.summary.segments, "failed": len(self.summary.unreadable)}
                bar.set_postfix(counts, refresh=False)

            run_jobs(read_segments, jobs, done)
            self.encode()
            self.commit()
            bar.set_postfix(segments=self.summary.segments, failed=len(self.summary.unreadable))

    def add(self, job: SegmentJob, file: SegmentedFile) -> None:
        """Queues the segments of a file, encodes full batches, and commits at intervals."""
        size, mtime = self.stamps[job.path]
        file_fields = {"path": job.path, "size": size, "mtime": mtime}
        if file.note:
            self.summary.partial[job.path] = file.note
        if file.failure:
            self.summary.unreadable[job.path] = file.failure
            if (
                file.failure != CRASHED
            ):  # a crash may be due to the machine: retried by the next run
                self.failed.append({**file_fields, "reason": file.failure})
        else:
            self.missing[job.path] = len(file.segments)
            frames = load_frames(job, file.segments)
            for segment, frames_FxSxSx3 in zip(file.segments, frames, strict=True):
                count = len(segment.times)
                row = {
                    "id": segment_id(job.path, size, mtime, segment.start),
                    **file_fields,
                    "start": segment.start,
                    "end": segment.end,
                    "count": count,
                    "times": [*segment.times, *[0.0] * (job.max_frames - count)],
                    "thumbnail": segment.thumbnail,
                }
                self.batch.append((row, frames_FxSxSx3))
                if len(self.batch) == self.batch_size:
                    self.encode()
        now = time.monotonic()
        interval = max(MIN_COMMIT_SECONDS, COMMIT_FRACTION * (now - self.start_time))
        if now - self.commit_time > interval:
            self.commit()

    def encode(self) -> None:
        """Encodes the batch.

        It is padded to a fixed shape: features must not depend on the other segments of a batch.
        """
        if not self.batch:
            return
        model = self.retriever.model
        shape = (self.batch_size, model.config.max_frames, *self.batch[0][1].shape[1:])
        frames, mask = np.zeros(shape, np.uint8), np.zeros(shape[:2], bool)
        for index, (_, frames_FxSxSx3) in enumerate(self.batch):
            count = len(frames_FxSxSx3)
            frames[index, :count], mask[index, :count] = frames_FxSxSx3, True
        features = encode_videos(
            model, self.retriever.params, frames, mask, batch_size=self.batch_size
        )
        dtype = np.dtype(self.store.about["precision"])
        for index, (row, _) in enumerate(self.batch):
            row["video"] = features.video[index].astype(dtype)
            row["frames"] = features.frames[index].reshape(-1).astype(dtype)
            self.missing[row["path"]] -= 1
            self.encoded.append(row)
        self.summary.segments += len(self.batch)
        self.batch = []

    def commit(self) -> None:
        """Commits the completely encoded files, then removes their outdated versions."""
        complete = [row for row in self.encoded if not self.missing[row["path"]]]
        self.encoded = [row for row in self.encoded if self.missing[row["path"]]]
        if complete:
            self.store.add(complete)
        if self.failed:
            self.store.add_unreadable(self.failed)
        paths = {row["path"] for row in [*complete, *self.failed]}
        changed = {path: self.stamps[path] for path in sorted(paths & self.outdated)}
        self.store.remove_outdated(changed)
        self.summary.removed += len(changed)
        self.summary.files += len(paths) - len(self.failed)
        self.failed = []
        self.commit_time = time.monotonic()


def fingerprint(retriever: Retriever) -> str:
    """Returns 16 hexadecimal digits computed from everything that determines a model's features."""
    ignored = ("step", "selected_on", "remat")
    config = {name: value for name, value in retriever.config.items() if name not in ignored}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=8)
    for path, array in jax.tree_util.tree_leaves_with_path(retriever.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def segment_id(path: str, size: int, mtime: int, start: float) -> str:
    """Returns 16 hexadecimal digits that change when the file changes."""
    key = repr((path, size, mtime, start)).encode()
    return hashlib.blake2b(key, digest_size=8).hexdigest()


def is_below(path: str, videos: Iterable[str | os.PathLike]) -> bool:
    """Returns True if `path` is one of these files or is inside one of these folders."""
    folders = [os.path.abspath(video) for video in videos]
    return any(path == folder or Path(folder) in Path(path).parents for folder in folders)


def _stamp(path: str) -> FileStamp | None:
    """Returns (size, modification time in ns), or None if the file no longer exists."""
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return None


def _is_utf8(path: str) -> bool:
    """Returns True if the index can store the path (on Linux, names may be any bytes)."""
    return path == path.encode("utf-8", "replace").decode()


@contextlib.contextmanager
def _writer_lock(store: Store) -> Iterator[None]:
    """Locks the index for one writing process, unless it is in a bucket, which has no locks."""
    if "://" in store.location:
        yield
        return
    lock = FileLock(Path(store.location, "writer.lock"), timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise InputError(f"another process is adding to {store.location}") from None


@contextlib.contextmanager
def _frames_folder() -> Iterator[Path]:
    """Makes a temporary folder for frames, and removes those of processes that were killed."""
    for old in Path(tempfile.gettempdir()).glob("xclip_jax-frames-*"):
        pid = old.name.split("-")[2]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc").exists():
            shutil.rmtree(old, ignore_errors=True)
    prefix = f"xclip_jax-frames-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
