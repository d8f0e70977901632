"""Reading the frames of clips, once each, into cache files; on all cores of this machine."""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np

from xclip_jax.cli import progress
from xclip_jax.data.video import VideoError, encode_jpeg, read_frames
from xclip_jax.workers import run_jobs

CRASHED = "the decoder crashed on this file"


@dataclasses.dataclass(frozen=True)
class Job:
    """A clip to read: `path` from `start` to `end` seconds, into the file `cache`.

    `path` is None where no file answers to the annotation's `video`.
    """

    video: str
    path: Path | None
    cache: Path | None
    image_size: int
    start: float | None = None
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a job.

    failure: why there are no frames, or None. note: why they are not all, or None.
    size: bytes of the frames. digest: of the frames and their times.
    """

    failure: str | None = None
    note: str | None = None
    size: int = 0
    digest: str = ""


def make_job(folder, video, path, image_size, start, end):
    """The job; its cache file is named after all that its content depends on."""
    if path is None:
        return Job(video, None, None, image_size, start, end)
    status = path.stat()
    key = repr((str(path), status.st_size, status.st_mtime_ns, start, end, image_size))
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Job(video, path, folder / name[:2] / f"{name}.npz", image_size, start, end)


def extract(job):
    """Reads the frames of one clip into its cache file, unless they are there."""
    if job.path is None:
        return Outcome(f"no video file answers to {job.video!r}")
    if job.cache.is_file():
        with np.load(job.cache) as arrays:
            return _outcome(arrays)
    try:
        frames = read_frames(job.path, job.image_size, job.start, job.end)
    except VideoError as error:
        return Outcome(str(error))
    jpegs = [encode_jpeg(frame) for frame in frames.frames]
    content = {
        "sizes": np.array([len(jpeg) for jpeg in jpegs]),
        "jpegs": np.frombuffer(b"".join(jpegs), np.uint8),
        "times": np.array(frames.times, np.float32),
    }
    digest = hashlib.sha256(b"".join(array.tobytes() for array in content.values())).hexdigest()
    content |= {"note": np.array(frames.note or ""), "digest": np.array(digest)}
    job.cache.parent.mkdir(parents=True, exist_ok=True)
    partial = job.cache.with_suffix(f".{os.getpid()}.part")
    with partial.open("wb") as file:  # renamed when whole: a kill leaves no half file
        np.savez(file, **content)
    partial.replace(job.cache)
    return _outcome(content)


def _outcome(content):
    """The Outcome of a cache file's content."""
    note, digest = str(content["note"]) or None, str(content["digest"])
    return Outcome(None, note, int(content["sizes"].sum()), digest)


def record(clip_id, captions, cache):
    """One clip as the builder stores it, from its cache file."""
    with np.load(cache) as arrays:
        ends = np.cumsum(arrays["sizes"])
        jpegs = arrays["jpegs"].tobytes()
        return {
            "id": clip_id,
            "captions": list(captions),
            "frames": [jpegs[e - n : e] for e, n in zip(ends, arrays["sizes"], strict=True)],
            "times": arrays["times"],
        }


def extract_all(jobs):
    """`extract` of every job on all cores, in order, with a progress bar."""
    outcomes, failures = [None] * len(jobs), 0

    def done(index, outcome):
        nonlocal failures
        outcomes[index] = outcome or Outcome(CRASHED)
        failures += outcomes[index].failure is not None
        bar.update()
        bar.set_postfix(failed=failures, refresh=False)

    with progress(len(jobs), "reading videos", "clip") as bar:
        run_jobs(extract, jobs, done)
    return outcomes
