"""Extracts frames of clips into cache files, locally or on Beam, and reports failures."""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xclip_jax.cli import InputError, progress
from xclip_jax.data.annotations import Finding, Listing
from xclip_jax.data.beam import BeamRunner, map_on_beam
from xclip_jax.data.video import VideoError, encode_jpeg, read_frames
from xclip_jax.workers import run_jobs

CRASHED = "the decoder crashed on this file"


@dataclasses.dataclass(frozen=True)
class ClipJob:
    """A clip to read, from `start` to `end` seconds of the file `path`, into the file `cache`.

    `path` and `cache` are None if there is no file for the annotation's `video`.
    """

    video: str
    image_size: int
    path: Path | None = None
    cache: Path | None = None
    start: float | None = None
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a ClipJob.

    Attributes:
        failure: reason why there are no frames, or None.
        note: reason why frames are missing, or None.
        size: bytes of the frames.
        digest: of the frames and their times.
    """

    failure: str | None = None
    note: str | None = None
    size: int = 0
    digest: str = ""


def make_job(
    video: str,
    path: Path | None,
    *,
    image_size: int,
    folder: Path,
    start: float | None = None,
    end: float | None = None,
) -> ClipJob:
    """Returns a job whose cache file in `folder` is named by a hash of all its inputs."""
    if path is None:
        return ClipJob(video, image_size)
    status = path.stat()
    key = repr((str(path), status.st_size, status.st_mtime_ns, start, end, image_size))
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    cache = folder / name[:2] / f"{name}.npz"
    return ClipJob(video, image_size, path=path, cache=cache, start=start, end=end)


def extract(job: ClipJob) -> Outcome:
    """Reads the frames of one clip into its cache file, unless that exists."""
    if job.path is None or job.cache is None:
        return Outcome(f"no video file found for {job.video!r}")
    if job.cache.is_file():
        with np.load(job.cache) as arrays:
            return _outcome(arrays)
    try:
        frames = read_frames(job.path, job.image_size, start=job.start, end=job.end)
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
    with partial.open("wb") as file:
        np.savez(file, **content)
    partial.replace(job.cache)  # atomic: a kill leaves no incomplete cache file
    return _outcome(content)


def _outcome(content: Any) -> Outcome:
    """Returns the Outcome of a cache file's content."""
    note, digest = str(content["note"]) or None, str(content["digest"])
    return Outcome(note=note, size=int(content["sizes"].sum()), digest=digest)


def make_record(clip_id: str, captions: Iterable[str], cache: Path) -> dict[str, Any]:
    """Returns the record of a clip (see `data.builder`), from its cache file."""
    with np.load(cache) as arrays:
        ends = np.cumsum(arrays["sizes"])
        jpegs = arrays["jpegs"].tobytes()
        return {
            "id": clip_id,
            "captions": list(captions),
            "frames": [jpegs[e - n : e] for e, n in zip(ends, arrays["sizes"], strict=True)],
            "times": arrays["times"],
        }


def extract_all(
    jobs: Sequence[ClipJob], folder: Path, beam_runner: BeamRunner | None = None
) -> list[Outcome]:
    """Runs `extract` on every job: in worker processes with a progress bar, or on Beam.

    `folder` must be accessible to all machines.
    """
    if beam_runner is not None:
        results = map_on_beam(_extract_as_dict, jobs, folder, beam_runner)
        return [Outcome(**result) for result in results]
    outcomes, failures = [Outcome(CRASHED)] * len(jobs), 0

    def store(index: int, outcome: Outcome | None) -> None:
        nonlocal failures
        outcomes[index] = outcome or outcomes[index]
        failures += outcomes[index].failure is not None
        bar.update()
        bar.set_postfix(failed=failures, refresh=False)

    with progress(len(jobs), "reading videos", "clip") as bar:
        run_jobs(extract, jobs, store)
    return outcomes


def _extract_as_dict(job: ClipJob) -> dict[str, Any]:
    return dataclasses.asdict(extract(job))


# Reports


def report_findings(
    output: Path,
    title: str,
    listing: Listing,
    *,
    paths: Sequence[Path | None],
    files: Iterable[Path],
) -> None:
    """Writes findings.jsonl and prints the numbers of expected clips, found clips and findings.

    Args:
        output: folder of findings.jsonl.
        title: of the printed table.
        listing: all clips of the annotations.
        paths: the file of each clip, or None.
        files: all video files in the folder.
    """
    pairs = zip(listing.clips, paths, strict=True)
    absent = [Finding("id without a file", clip.video, clip.split) for clip, p in pairs if not p]
    used = set(paths)
    unused = [Finding("file that no clip uses", str(p)) for p in files if p not in used]
    findings = [*listing.findings, *absent, *unused]
    lines = (json.dumps(dataclasses.asdict(finding), ensure_ascii=False) for finding in findings)
    path = output / "findings.jsonl"
    text = "".join(line + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    if listing.expected:
        print(f"{title:20}{'expected':>10}{'found':>10}{'missing':>10}")
    counts = listing.counts() - collections.Counter(finding.detail for finding in absent)
    for split, expected in listing.expected.items():
        missing = expected - counts[split]
        line = f"  {split:18}{expected:10,}{counts[split]:10,}{max(0, missing):10,}"
        print(line + (f"  {-missing:,} too many: wrong list?" if missing < 0 else ""))
    kinds = collections.Counter(finding.what for finding in findings)
    for what, count in kinds.items():
        print(f"  {count:,} x {what}")
    if kinds:
        print(f"  listed in {path}")


def report_failures(
    output: Path, listing: Listing, outcomes: Sequence[Outcome], max_failures: float
) -> None:
    """Writes failures.jsonl, prints counts and raises InputError if too many clips failed."""
    clips = listing.clips
    entries = [
        {"id": clip.id, "reason": outcome.failure or outcome.note, "kept": not outcome.failure}
        for clip, outcome in zip(clips, outcomes, strict=True)
        if outcome.failure or outcome.note
    ]
    entries += [{"id": lost.id, "reason": lost.what, "kept": False} for lost in listing.lost]
    path = output / "failures.jsonl"
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_text("".join(lines), encoding="utf-8")
    failed = [entry for entry in entries if not entry["kept"]]
    total, partial = len(clips) + len(listing.lost), len(entries) - len(failed)
    print(
        f"{total - len(failed)} of {total} clips read"
        + (f", {partial} of them only in part" if partial else "")
        + (f"; {len(failed)} failed" if failed else "")
        + (f" (listed in {path})" if entries else "")
    )
    if len(failed) / total > max_failures or len(failed) == total:
        message = f"{len(failed)} of {total} clips failed"
        if len(failed) < total:
            message += f", more than --max_failures={max_failures:g} allows"
        message += f"; the first is {failed[0]['id']}: {failed[0]['reason']}"
        raise InputError(f"{message}; all failures are listed in {path}")
    # A small split may fail completely within the failures allowed for all.
    totals, failures = listing.counts(), collections.Counter[str]()
    for clip, outcome in zip(clips, outcomes, strict=True):
        failures[clip.split] += outcome.failure is not None
    for lost in listing.lost:
        totals[lost.detail] += 1
        failures[lost.detail] += 1
    for split, count in failures.items():
        if count / totals[split] > max_failures:
            raise InputError(
                f"{count} of {totals[split]} {split} clips failed, more than "
                f"--max_failures={max_failures:g} allows; all failures are listed in {path}"
            )
