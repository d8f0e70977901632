"""Updates an index from folders of videos: encodes the segments of changed files."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import UInt8

from xclip_jax.cli import InputError, PathLike, progress
from xclip_jax.data.extraction import CRASHED, VideoFolder
from xclip_jax.data.preprocess import frame_format
from xclip_jax.inference import pad_rows
from xclip_jax.metrics import hubness_bias
from xclip_jax.models import ModelConfig
from xclip_jax.retriever import Retriever
from xclip_jax.search.segments import Segment, SegmentJob, load_frames, read_segments
from xclip_jax.search.store import FileStamp, Store
from xclip_jax.search.timed_text import TextReader, add_texts
from xclip_jax.workers import run_jobs

Row = dict[str, Any]  # column -> value
HIDING = "missing, empty or not readable: what the index holds of it stays"
NAME_NOT_UTF8 = "the file name is not UTF-8"
# Each commit adds a file that readers must open, so commits become rarer as a run gets longer.
MIN_COMMIT_SECONDS = 5
COMMIT_FRACTION = 0.02  # minimum time between commits, as a fraction of the run's time so far
# Fields of a model that the first versions had in these sections, and others that they had not.
_FORMER_FIELDS = {
    "vision": ("image_size", "patch_size", "width", "layers", "heads"),
    "text": ("vocab_size", "context_length", "width", "layers", "heads"),
    "preprocess": ("image_size", "mean", "std", "resize", "interpolation"),
}
_LATER_FIELDS = ("towers", "max_scale")


class BusyError(InputError):
    """The error that another process is adding to an index: a later attempt may succeed."""


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
    readers: Sequence[TextReader] = (),
    *,
    prune: bool = False,
) -> IndexingSummary:
    """Adds new and changed files to the index, and then their text by `readers`.

    See `xclip_jax.search.Index.add`. Raises BusyError if another process is adding files.
    """
    paths, unlisted = find_videos(videos, allow_none=prune)
    summary = IndexingSummary(unreadable=unlisted)
    if store.about["shots"] and importlib.util.find_spec("scenedetect") is None:
        raise InputError("--shots requires scenedetect: run pip install -e '.[shots]'")
    with contextlib.ExitStack() as stack:
        if "://" not in store.location:  # a bucket has no locks
            try:
                stack.enter_context(FileLock(Path(store.location, "writer.lock"), timeout=0))
            except Timeout:
                raise BusyError(f"another process is adding to {store.location}") from None
        indexed = store.files()
        stamps = _read_stamps(paths, indexed, summary)
        if prune:
            missing = [path for path in indexed if path not in stamps and is_below(path, videos)]
            given = {os.path.abspath(video) for video in videos}
            folders = {path: find_hiding_folder(path, given) for path in missing}
            deleted = [path for path, folder in folders.items() if folder is None]
            store.remove(dict.fromkeys(deleted))
            summary.removed = len(deleted)
            summary.unreadable |= {folder: HIDING for folder in folders.values() if folder}
        new = {path: stamp for path, stamp in stamps.items() if stamp not in indexed.get(path, ())}
        unchanged = {path: stamp for path, stamp in stamps.items() if path not in new}
        # A killed run may have left the outdated version of a file beside the new one.
        store.remove({path: stamp for path, stamp in unchanged.items() if len(indexed[path]) > 1})
        reasons = {path: indexed[path][stamp] for path, stamp in unchanged.items()}
        summary.unreadable |= {path: reason for path, reason in reasons.items() if reason}
        summary.unchanged = sum(not reason for reason in reasons.values())
        if new:
            _Writer(store, retriever, new, set(indexed), summary).run()
        summary.texts = add_texts(store, stamps, readers, summary.partial)
        store.compact()
    return summary


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
class _Writer:
    """Reads files in worker processes, encodes segments in batches, commits complete files."""

    store: Store
    retriever: Retriever
    stamps: Mapping[str, FileStamp]
    indexed: set[str]  # paths that have an older version in the index
    summary: IndexingSummary

    def __post_init__(self) -> None:
        self.batch: list[tuple[Row, UInt8[np.ndarray, "F S S 3"]]] = []  # not encoded
        self.encoded: list[Row] = []  # to commit
        self.failed: list[Row] = []  # unreadable files to commit
        self.start_time = self.commit_time = time.monotonic()
        captions = self.store.bank()
        self.bank = self.retriever.encode_text(captions) if captions else None
        self.batch_size = (4 if jax.default_backend() == "cpu" else 64) * jax.local_device_count()

    def run(self) -> None:
        """Indexes all files of `stamps`."""
        about, summary = self.store.about, self.summary
        names = ("max_frames", "segment_seconds", "overlap_seconds", "shots")
        options = {name: about[name] for name in names if name in about}
        options["format"] = frame_format(self.retriever.model.config)
        # Processes that were killed have left their folders.
        for old in Path(tempfile.gettempdir()).glob("xclip_jax-frames-*"):
            if Path("/proc/self").exists() and not Path("/proc", old.name.split("-")[2]).exists():
                shutil.rmtree(old, ignore_errors=True)
        prefix = f"xclip_jax-frames-{os.getpid()}-"
        size = sum(size for size, _ in self.stamps.values())
        temporary = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
        with temporary as folder, progress(size, "indexing", "B") as bar:
            files = (Path(folder, str(number)) for number in range(len(self.stamps)))
            jobs = [SegmentJob(*pair, **options) for pair in zip(self.stamps, files, strict=True)]

            def done(index: int, result: tuple[list[Segment], str | None, bool] | None) -> None:
                job = jobs[index]
                self.add(job, *(result or ([], CRASHED, True)))
                job.frames_file.unlink(missing_ok=True)
                bar.update(self.stamps[job.path][0])
                counts = {"segments": summary.segments, "failed": len(summary.unreadable)}
                bar.set_postfix(counts, refresh=False)

            run_jobs(read_segments, jobs, done)
            self.encode()
            self.commit()
            bar.set_postfix(segments=summary.segments, failed=len(summary.unreadable))

    def add(
        self, job: SegmentJob, segments: list[Segment], problem: str | None, retry: bool
    ) -> None:
        """Queues the segments of a file, encodes full batches, and commits at intervals."""
        size, mtime = self.stamps[job.path]
        file_fields = {"path": job.path, "size": size, "mtime": mtime}
        if problem:
            problems = self.summary.partial if segments else self.summary.unreadable
            problems[job.path] = problem
        if not segments and not retry:
            self.failed.append({**file_fields, "reason": problem})
        for segment, frames_FxSxSx3 in zip(segments, load_frames(job, segments), strict=False):
            key = repr((job.path, size, mtime, segment.start)).encode()
            row = {"id": hashlib.blake2b(key, digest_size=8).hexdigest(), **file_fields}
            row |= {**vars(segment), "count": len(segment.times)}
            row["times"] = segment.times + [0.0] * (job.max_frames - len(segment.times))
            self.batch.append((row, frames_FxSxSx3))
            if len(self.batch) == self.batch_size:
                self.encode()
        now = time.monotonic()
        interval = max(MIN_COMMIT_SECONDS, COMMIT_FRACTION * (now - self.start_time))
        if now - self.commit_time > interval:
            self.commit()

    def encode(self) -> None:
        """Encodes the batch, padded to a fixed shape: features must not depend on their batch."""
        if not self.batch:
            return
        retriever, about, size = self.retriever, self.store.about, self.batch_size
        counts = np.array([row["count"] for row, _ in self.batch])
        mask = np.arange(about["max_frames"]) < counts[:, None]
        frames = np.stack([pad_rows(frames, about["max_frames"]) for _, frames in self.batch])
        frames, mask = pad_rows((frames, mask), size)
        features = retriever.encode("encode_video", (frames, mask), size)
        dtype = np.dtype(about["precision"])
        biases = None
        if self.bank is not None:
            bank_BxV = retriever.similarity(self.bank, features) / retriever.scale
            biases = hubness_bias(bank_BxV).astype(np.float32)
        for index, (row, _) in enumerate(self.batch):
            if biases is not None:
                row["bias"] = biases[index]
            row["video"] = features.video[index].astype(dtype)
            row["frames"] = features.frames[index].reshape(-1).astype(dtype)
            if features.weights is not None:
                row["weights"] = features.weights[index].astype(dtype)
            self.encoded.append(row)
        self.summary.segments += len(self.batch)
        self.batch = []

    def commit(self) -> None:
        """Commits the completely encoded files, then removes their outdated versions."""
        incomplete = {row["path"] for row, _ in self.batch}
        complete = [row for row in self.encoded if row["path"] not in incomplete]
        self.encoded = [row for row in self.encoded if row["path"] in incomplete]
        self.store.add(complete, self.failed)
        paths = {row["path"] for row in [*complete, *self.failed]}
        changed = {path: self.stamps[path] for path in sorted(paths & self.indexed)}
        self.store.remove(changed)
        self.summary.removed += len(changed)
        self.summary.files += len(paths) - len(self.failed)
        self.failed = []
        self.commit_time = time.monotonic()


def fingerprint(retriever: Retriever) -> str:
    """Returns 16 hexadecimal digits computed from everything that determines a model's features.

    Fields that the first versions did not have count where they are not the default.
    """
    ignored = ("step", "selected_on", "base_model", "remat", "param_dtype")
    config = {name: value for name, value in retriever.config.items() if name not in ignored}
    defaults = dataclasses.asdict(ModelConfig())
    config = _drop_defaults(config, {name: defaults[name] for name in _LATER_FIELDS})
    for section, former in _FORMER_FIELDS.items():
        if section in config:
            later = {k: v for k, v in defaults[section].items() if k not in former}
            config[section] = _drop_defaults(config[section], later)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=8)
    for path, array in jax.tree_util.tree_leaves_with_path(retriever.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def _drop_defaults(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that have no default, or another value."""
    return {k: v for k, v in fields.items() if k not in defaults or v != defaults[k]}


def is_below(path: str, videos: Iterable[PathLike]) -> bool:
    """Returns True if `path` is one of these files or is inside one of these folders.

    Files of a linked folder may be indexed by the names that they have without the link.
    """
    names = {name for video in videos for name in (os.path.abspath(video), os.path.realpath(video))}
    return any(Path(path).is_relative_to(name) for name in names)
