"""Finds the video files of clips, extracts their frames into cache files and reports failures."""

import collections
import dataclasses
import hashlib
import json
import os
import posixpath
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from os.path import isfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xclip_jax.cli import InputError, PathLike, atomic_file, progress
from xclip_jax.data.annotations import Clip, Finding, Listing
from xclip_jax.data.container import VideoError
from xclip_jax.data.preprocess import FrameFormat, encode_jpeg
from xclip_jax.data.video import read_frames
from xclip_jax.workers import BeamRunner, map_on_beam, run_jobs

CRASHED = "the decoder crashed on this file"
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".divx", ".mpg", ".mpeg", ".m2v"),
    *(".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv"),
    *(".3gpp", ".rm", ".rmvb", ".mxf", ".ogg", ".gif"),
)


class VideoFolder:
    """The files in a folder and its sub-folders, indexed by the names annotations may use.

    A video file is found by its path below the folder and by its name, each also without its
    video suffixes, one by one (`a.mov.mp4` and `a..mp4` are also found as `a`). A file with another
    suffix is found by its full name or path only. Names may be in any Unicode normal form. Symbolic
    links are followed, each folder once. `files` are the video files, sorted; `unlisted` is
    {folder: reason} of those that cannot be listed. Raises InputError if there is no video file.
    """

    def __init__(self, folder: PathLike) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"no such folder of videos: {folder}")
        self.files: list[Path] = []
        self.unlisted: dict[str, str] = {}
        self._by_path: dict[str, Path] = {}
        self._by_name: dict[str, list[Path]] = collections.defaultdict(list)
        paths, seen = [], set()

        def note(error: OSError) -> None:
            self.unlisted[str(error.filename)] = f"cannot be listed: {error.strerror}"

        for parent, folders, names in os.walk(folder, followlinks=True, onerror=note):
            if not os.access(parent, os.X_OK):
                self.unlisted[parent] = "cannot be searched: permission denied"
            if (real := os.path.realpath(parent)) in seen:  # links may form a cycle
                folders.clear()
            else:
                paths += [Path(parent, name) for name in names if isfile(Path(parent, name))]
            seen.add(real)
        for path in sorted(paths):
            below = path.relative_to(folder)
            names = [path.name]
            while stem := _without_suffix(names[-1]):
                names.append(stem)
            self._by_path[_normalize(below.as_posix())] = path
            for name in {*names, *((below.parent / name).as_posix() for name in names)}:
                self._by_name[_normalize(name)].append(path)
            if len(names) > 1:
                self.files.append(path)
        if not self.files and not self.unlisted:
            raise InputError(f"no video files in {folder}")

    def locate(self, video: str, *, is_path: bool = False) -> Path | None:
        """Returns the file that an annotation refers to by an id or a name of any suffix, or None.

        With `is_path`, `video` may be a path in the folder, which then matches that file only. If
        several files match, an InputError names them.
        """
        name = _normalize(video)
        if is_path and name in self._by_path:
            return self._by_path[name]
        paths = self._by_name.get(name, [])
        if not is_path or not paths:
            paths = sorted({*paths, *self._by_name.get(_without_suffix(name), [])})
        if len(paths) > 1:
            raise InputError(f"video {video!r} is ambiguous: {' and '.join(map(str, paths[:3]))}")
        return paths[0] if paths else None


def _normalize(name: str) -> str:
    """Returns a relative path in one spelling: without `./` and `//`, in Unicode's form NFC."""
    return unicodedata.normalize("NFC", posixpath.normpath(name))


def _without_suffix(name: str) -> str:
    """Returns the name without its video suffix or final dot (DiDeMo), "" if it has neither."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and (not suffix or f".{suffix.lower()}" in VIDEO_SUFFIXES) else ""


@dataclasses.dataclass(frozen=True)
class ClipJob:
    """A clip to read from `path` (None: not found), up to `end` seconds, into the file `cache`."""

    clip: Clip
    format: FrameFormat
    path: Path | None = None
    cache: Path | None = None
    end: float | None = None


class Outcome(NamedTuple):
    """Result of a ClipJob."""

    failure: str | None = None  # reason why there are no frames
    note: str | None = None  # reason why frames are missing
    size: int = 0  # bytes of the frames
    digest: str = ""  # of the frames and their times


def make_job(
    clip: Clip, path: Path | None, format: FrameFormat, max_seconds: float | None, folder: Path
) -> ClipJob:
    """Returns a job whose cache file in `folder` is named by a hash of all its inputs."""
    if path is None:
        return ClipJob(clip, format)
    end = clip.end
    if max_seconds is not None:
        last = (clip.start or 0) + max_seconds
        end = last if end is None else min(end, last)
    status = path.stat()
    key = repr((str(path), status.st_size, status.st_mtime_ns, clip.start, end, *format.key))
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return ClipJob(clip, format, path, folder / name[:2] / f"{name}.npz", end)


def extract(job: ClipJob) -> Outcome:
    """Reads the frames of one clip into its cache file, unless that exists."""
    if job.path is None or job.cache is None:
        return Outcome(f"no video file found for {job.clip.video!r}")
    content: Any = _read_cache(job.cache)
    if content is None:
        try:
            frames = read_frames(job.path, job.format, start=job.clip.start, end=job.end)
        except VideoError as error:
            return Outcome(str(error))
        jpegs = [encode_jpeg(frame) for frame in frames.frames]
        content = {"sizes": np.array(list(map(len, jpegs)))}
        content["jpegs"] = np.frombuffer(b"".join(jpegs), np.uint8)
        content["times"] = np.array(frames.times, np.float32)
        digest = hashlib.sha256(b"".join(array.tobytes() for array in content.values())).hexdigest()
        content |= {"note": np.array(frames.note or ""), "digest": np.array(digest)}
        job.cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(job.cache) as partial, partial.open("wb") as file:
            np.savez(file, **content)
    size, digest = int(content["sizes"].sum()), str(content["digest"])
    return Outcome(None, str(content["note"]) or None, size, digest)


def _read_cache(path: Path) -> dict[str, np.ndarray] | None:
    """Reads a cache file, or returns None if it is missing or corrupted (by a power failure)."""
    try:
        with np.load(path) as arrays:
            content = {name: arrays[name] for name in ("sizes", "jpegs", "times", "note", "digest")}
        frames = b"".join(content[name].tobytes() for name in ("sizes", "jpegs", "times"))
        is_intact = hashlib.sha256(frames).hexdigest() == str(content["digest"])
        return content if is_intact else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def make_record(clip: Clip, cache: Path) -> dict[str, Any]:
    """Returns the record of a clip (see `data.builder`), from its cache file."""
    with np.load(cache) as arrays:
        ends = np.cumsum(arrays["sizes"])
        jpegs = arrays["jpegs"].tobytes()
        frames = [jpegs[e - n : e] for e, n in zip(ends, arrays["sizes"], strict=True)]
        record = {"id": clip.id, "captions": list(clip.captions)}
        return record | {"frames": frames, "times": arrays["times"]}


def extract_all(jobs: Sequence[ClipJob], folder: Path, beam: BeamRunner | None) -> list[Outcome]:
    """Runs `extract` on every job: in worker processes, or on Beam with a shared `folder`."""
    if beam is not None:
        return [Outcome(*result) for result in map_on_beam(extract, jobs, folder, beam)]
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


def report_findings(
    output: Path, title: str, listing: Listing, paths: Sequence[Path | None], files: Iterable[Path]
) -> None:
    """Writes findings.jsonl and prints the numbers of expected clips, found clips and findings.

    `paths` has the file of each clip, or None; `files` are all video files in the folder.
    """
    pairs = zip(listing.clips, paths, strict=True)
    absent = [Finding("id without a file", clip.video, clip.split) for clip, p in pairs if not p]
    used = set(paths)
    unused = [Finding("file that no clip uses", str(p)) for p in files if p not in used]
    findings = [*listing.findings, *absent, *unused]
    path = output / "findings.jsonl"
    _write_lines(path, map(dataclasses.asdict, findings))
    if listing.expected:
        print(f"{title:20}{'expected':>10}{'found':>10}{'missing':>10}")
    counts = listing.counts() - collections.Counter(finding.detail for finding in absent)
    for split, expected in listing.expected.items():
        missing = expected - counts[split]
        line = f"  {split:18}{expected:10,}{counts[split]:10,}{max(0, missing):10,}"
        print(line + (f"  {-missing:,} too many: wrong list?" if missing < 0 else ""))
    for what, count in collections.Counter(finding.what for finding in findings).items():
        print(f"  {count:,} x {what}")
    if findings:
        print(f"  listed in {path}")


def report_failures(
    output: Path, listing: Listing, outcomes: Sequence[Outcome], max_failures: float
) -> None:
    """Writes failures.jsonl, prints counts and raises InputError if too many clips failed."""
    path = output / "failures.jsonl"
    pairs = zip(listing.clips, outcomes, strict=True)
    results = [(c.split, c.id, o.failure or o.note, not o.failure) for c, o in pairs]
    results += [(lost.detail, lost.id, lost.what, False) for lost in listing.lost.values()]
    entries = [{"id": i, "reason": r, "kept": kept} for _, i, r, kept in results if r]
    _write_lines(path, entries)
    failed = [entry for entry in entries if not entry["kept"]]
    total, partial = len(results), len(entries) - len(failed)
    print(
        f"{total - len(failed)} of {total} clips read"
        + (f", {partial} of them only in part" if partial else "")
        + (f"; {len(failed)} failed" if failed else "")
        + (f" (listed in {path})" if entries else "")
    )
    allowed = f", more than --max_failures={max_failures:g} allows"
    listed = f"; all failures are listed in {path}"
    if len(failed) / total > max_failures or len(failed) == total:
        count = f"{len(failed)} of {total} clips failed" + (allowed if len(failed) < total else "")
        raise InputError(f"{count}; the first is {failed[0]['id']}: {failed[0]['reason']}{listed}")
    # A small split may fail completely within the failures allowed for all.
    for split, total in collections.Counter(split for split, *_ in results).items():
        count = sum(not kept for name, *_, kept in results if name == split)
        if count / total > max_failures:
            raise InputError(f"{count} of {total} {split} clips failed{allowed}{listed}")


def _write_lines(path: Path, entries: Iterable[Any]) -> None:
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
