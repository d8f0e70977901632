"""Bringing an index up to date with folders of videos."""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from filelock import FileLock, Timeout

from xclip_jax.cli import InputError, progress
from xclip_jax.data.extraction import CRASHED
from xclip_jax.data.locate import VideoFolder
from xclip_jax.inference import encode_videos
from xclip_jax.search.segments import Job, Reading, check_shots, frames_of, read_segments
from xclip_jax.workers import run_jobs

NO_TEXT = "its name is not UTF-8"
# Between commits: each is a file more to be read from, so in a run of days they are further apart.
COMMIT_SECONDS = 5  # at least
COMMIT_SHARE = 0.02  # of the time the run has taken so far


@dataclasses.dataclass
class Added:
    """What became of the files.

    Attributes:
        files, segments: read and added.
        unchanged: files that were in it.
        removed: files whose old state, or which themselves, were taken out.
        unreadable: {path: reason}, of files that were tried now or before and have not changed.
        partial: {path: why it was read only in part}.
    """

    files: int = 0
    segments: int = 0
    unchanged: int = 0
    removed: int = 0
    unreadable: dict = dataclasses.field(default_factory=dict)
    partial: dict = dataclasses.field(default_factory=dict)


def add_files(store, retriever, videos, prune=False):
    """See xclip_jax.search.index.Index.add."""
    here = find_videos(videos, may_be_none=prune)
    if store.about["shots"]:
        check_shots()
    with _alone(store), _frames_folder() as folder:
        added = Added(unreadable={path: NO_TEXT for path in here if not _is_utf8(path)})
        stamps = {path: stamp for path in here if (stamp := _stamp(path)) and _is_utf8(path)}
        known = store.files()
        if prune:
            gone = [path for path in known if path not in stamps and below(path, videos)]
            store.remove(gone)
            added.removed = len(gone)
        done = [path for path, stamp in stamps.items() if stamp in known.get(path, ())]
        _count_done(store, done, stamps, known, added)
        todo = [path for path, stamp in stamps.items() if stamp not in known.get(path, ())]
        if todo:
            _Writer(store, retriever, folder, stamps, known, added).run(todo)
        store.tidy()
    return added


def _count_done(store, done, stamps, known, added):
    """What is in the index already; an old state that a kill left beside the new one goes."""
    store.remove_old({path: stamps[path] for path in done if len(known[path]) > 1})
    reasons = store.unreadable()
    before = {path: reasons[path] for path in done if path in reasons}
    added.unchanged = len(done) - len(before)
    added.unreadable |= before


def find_videos(videos, may_be_none=False):
    """Absolute paths of the files, and of those in the folders and their sub-folders; sorted.

    Raises:
        InputError: there is nothing by a name, or no video at all.
    """
    found = set()
    for video in videos:
        if os.path.isdir(video):
            with contextlib.suppress(InputError):  # an empty one beside others is no mistake
                found.update(os.path.abspath(path) for path in VideoFolder(video).files)
        elif os.path.isfile(video):
            found.add(os.path.abspath(video))
        elif not may_be_none:
            raise InputError(f"no such file or folder of videos: {video}")
    if not found and not may_be_none:
        raise InputError(f"no video files in {', '.join(map(str, videos))}")
    return sorted(found)


class _Writer:
    """Reads files in worker processes, encodes their segments in batches, commits whole files."""

    def __init__(self, store, retriever, folder, stamps, known, added):
        self.store, self.retriever, self.folder = store, retriever, folder
        self.stamps, self.known, self.added = stamps, known, added
        self.batch = []  # (row, frames) still to be encoded
        self.open, self.ready = {}, []  # path -> rows not yet encoded; rows to be committed
        self.failed = []
        self.started = self.committed = time.monotonic()
        per_device = 4 if jax.default_backend() == "cpu" else 64
        self.batch_size = per_device * jax.local_device_count()

    def run(self, paths):
        model, about = self.retriever.model, self.store.about
        lengths = model.vision.image_size, model.max_frames
        cut = about["segment_seconds"], about["shots"]
        jobs = [Job(path, self.folder / str(n), *lengths, *cut) for n, path in enumerate(paths)]
        sizes = [self.stamps[path][0] for path in paths]
        with progress(sum(sizes), "indexing", "B") as bar:

            def done(index, reading):
                self.take(jobs[index], reading or Reading([], failure=CRASHED))
                jobs[index].frames.unlink(missing_ok=True)
                bar.update(sizes[index])
                counts = {"segments": self.added.segments, "failed": len(self.added.unreadable)}
                bar.set_postfix(counts, refresh=False)

            run_jobs(read_segments, jobs, done)
            self.encode(everything=True)
            self.commit()
            bar.set_postfix(segments=self.added.segments, failed=len(self.added.unreadable))

    def take(self, job, reading):
        """Queues the segments of a file."""
        size, mtime = self.stamps[job.path]
        about_file = {"path": job.path, "size": size, "mtime": mtime}
        if reading.failure:
            self.added.unreadable[job.path] = reading.failure
            if reading.failure != CRASHED:  # may be the machine's fault: tried again next time
                self.failed.append({**about_file, "reason": reading.failure})
            return self.commit_now_and_then()
        if reading.note:
            self.added.partial[job.path] = reading.note
        self.open[job.path] = len(reading.segments)
        frames = frames_of(job, reading.segments)
        for segment, pixels in zip(reading.segments, frames, strict=True):
            row = {
                "id": segment_id(job.path, size, mtime, segment.start),
                **about_file,
                "start": segment.start,
                "end": segment.end,
                "count": len(segment.times),
                "times": _filled(segment.times, job.max_frames),
                "thumbnail": segment.thumbnail,
            }
            self.batch.append((row, pixels))
            self.encode()
        return self.commit_now_and_then()

    def encode(self, everything=False):
        """Encodes the batch if it is full, or `everything` there is.

        Always the same shape, so that a segment's features do not depend on its company.
        """
        if not self.batch or (len(self.batch) < self.batch_size and not everything):
            return
        model = self.retriever.model
        shape = (self.batch_size, model.max_frames, *self.batch[0][1].shape[1:])
        frames, mask = np.zeros(shape, np.uint8), np.zeros(shape[:2], bool)
        for k, (_, pixels) in enumerate(self.batch):
            frames[k, : len(pixels)], mask[k, : len(pixels)] = pixels, True
        video = encode_videos(model, self.retriever.params, frames, mask, self.batch_size)
        dtype = np.dtype(self.store.about["precision"])
        for k, (row, _) in enumerate(self.batch):
            row["video"] = video.video[k].astype(dtype)
            row["frames"] = video.frames[k].reshape(-1).astype(dtype)
            self.ready.append(row)
            self.open[row["path"]] -= 1
        self.added.segments += len(self.batch)
        self.batch = []

    def commit_now_and_then(self):
        now = time.monotonic()
        if now - self.committed > max(COMMIT_SECONDS, COMMIT_SHARE * (now - self.started)):
            self.commit()

    def commit(self):
        """Commits the files all of whose segments are encoded; then their old state goes."""
        whole = [row for row in self.ready if not self.open[row["path"]]]
        self.ready = [row for row in self.ready if self.open[row["path"]]]
        if whole:
            self.store.add(whole)
        if self.failed:
            self.store.add_unreadable(self.failed)
        paths = dict.fromkeys(row["path"] for row in [*whole, *self.failed])
        changed = {path: self.stamps[path] for path in paths if path in self.known}
        self.store.remove_old(changed)
        self.added.removed += len(changed)
        self.added.files += len(paths) - len(self.failed)
        self.failed = []
        self.committed = time.monotonic()


def segment_id(path, size, mtime, start):
    """16 hexadecimal digits; a changed file has other segments."""
    key = repr((path, size, mtime, start)).encode()
    return hashlib.blake2b(key, digest_size=8).hexdigest()


def _filled(times, length):
    return [*times, *[0.0] * (length - len(times))]


def _stamp(path):
    """(size, mtime) of a file; None if it has just gone."""
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns


def _is_utf8(path):
    """Whether the name can be kept: on Linux it may be any bytes."""
    return path == path.encode("utf-8", "replace").decode()


def below(path, videos):
    """Whether a file is, or was, one of these or in one of these folders."""
    folders = (os.path.abspath(video) for video in videos)
    return any(path == folder or Path(folder) in Path(path).parents for folder in folders)


@contextlib.contextmanager
def _alone(store):
    """One process at a time adds to an index in a folder; a bucket has no such lock."""
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
def _frames_folder():
    """A folder for frames on their way from the workers; what killed runs left is removed."""
    for old in Path(tempfile.gettempdir()).glob("xclip_jax-frames-*"):
        pid = old.name.split("-")[2]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc").exists():
            shutil.rmtree(old, ignore_errors=True)
    prefix = f"xclip_jax-frames-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
