"""Finds the video files of clips, extracts their frames into cache files and reports failures."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import posixpath
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from os.path import isfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from xclip_jax.buckets import BucketFile, BucketPath, Location, local_file, read_file, write_file
from xclip_jax.cli import InputError, PathLike, progress
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
VideoFile = Path | BucketFile


class VideoFolder:
    """The files in a folder and its sub-folders, indexed by the names annotations may use.

    A video file is found by its path below the folder and by its name, each also without its
    video suffixes, one by one (`a.mov.mp4` and `a..mp4` are also found as `a`). A file with another
    suffix is found by its full name or path only. Names may be in any Unicode normal form. Symbolic
    links are followed, each folder once. `files` are the video files, sorted; `unlisted` is
    {folder: reason} of those that cannot be listed. Raises InputError if there is no video file.
    """

    def __init__(self, folder: PathLike | BucketPath) -> None:
        self.unlisted: dict[str, str] = {}
        self._by_path: dict[str, VideoFile] = {}
        self._by_name: dict[str, list[VideoFile]] = collections.defaultdict(list)
        self._names: dict[VideoFile, PurePosixPath] = {}  # of the video files, below the folder
        in_bucket = isinstance(folder, BucketPath)
        found = _list_bucket(folder) if in_bucket else self._walk(Path(folder))
        for below, path in sorted(found.items()):
            names = [below.name]
            while stem := _without_suffix(names[-1]):
                names.append(stem)
            self._by_path[_normalize(below.as_posix())] = path
            for name in {*names, *((below.parent / name).as_posix() for name in names)}:
                self._by_name[_normalize(name)].append(path)
            if len(names) > 1:
                self._names[path] = below
        self.files = list(self._names)
        if not self.files and not self.unlisted:
            raise InputError(f"no video files in {folder}")

    def _walk(self, folder: Path) -> dict[PurePosixPath, VideoFile]:
        """Returns {path below the folder: path} of all files on disk."""
        if not folder.is_dir():
            raise InputError(f"no such folder of videos: {folder}")
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
        return {PurePosixPath(path.relative_to(folder)): path for path in paths}

    def find_unused(self, used: Iterable[VideoFile | None]) -> list[str]:
        """Returns the names, below the folder, of the video files that are not `used`."""
        used = set(used)
        return [below.as_posix() for path, below in self._names.items() if path not in used]

    def locate(self, video: str, *, is_path: bool = False) -> VideoFile | None:
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


def _list_bucket(folder: BucketPath) -> dict[PurePosixPath, VideoFile]:
    """Returns {path below the folder: object} of all objects."""
    try:
        files = folder.list_files()
    except FileNotFoundError:
        raise InputError(f"no such folder of videos: {folder}") from None
    return {PurePosixPath(file.uri[len(folder.uri) + 1 :]): file for file in files}


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
    path: VideoFile | None = None
    cache: Location | None = None
    end: float | None = None


class Outcome(NamedTuple):
    """Result of a ClipJob."""

    failure: str | None = None  # reason why there are no frames
    note: str | None = None  # reason why frames are missing
    size: int = 0  # bytes of the frames
    digest: str = ""  # of the frames and their times


def file_size(path: VideoFile) -> int:
    """Returns the size of a video file in bytes."""
    return path.size if isinstance(path, BucketFile) else path.stat().st_size


def make_job(
    clip: Clip,
    path: VideoFile | None,
    format: FrameFormat,
    max_seconds: float | None,
    folder: Location,
) -> ClipJob:
    """Returns a job whose cache file in `folder` is named by a hash of all its inputs."""
    if path is None:
        return ClipJob(clip, format)
    end = clip.end
    if max_seconds is not None:
        last = (clip.start or 0) + max_seconds
        end = last if end is None else min(end, last)
    mtime = path.mtime_ns if isinstance(path, BucketFile) else path.stat().st_mtime_ns
    key = repr((str(path), file_size(path), mtime, clip.start, end, *format.key))
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return ClipJob(clip, format, path, folder / name[:2] / f"{name}.npz", end)


def extract(job: ClipJob) -> Outcome:
    """Reads the frames of one clip into its cache file, unless that exists."""
    return extract_group([job])[0]


def extract_group(jobs: Sequence[ClipJob]) -> list[Outcome]:
    """Extracts clips of one video, which is fetched once if it is in a bucket."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def fetch(path: VideoFile) -> Path:
            return stack.enter_context(local_file(path))

        return [_extract(job, fetch) for job in jobs]


def _extract(job: ClipJob, fetch: Callable[[VideoFile], Path]) -> Outcome:
    """Extracts one clip from the file that `fetch` returns."""
    if job.path is None or job.cache is None:
        return Outcome(f"no video file found for {job.clip.video!r}")
    content: Any = _read_cache(job.cache)
    if content is None:
        path = fetch(job.path)
        try:
            frames = read_frames(path, job.format, start=job.clip.start, end=job.end)
        except VideoError as error:
            return Outcome(str(error))
        jpegs = [encode_jpeg(frame) for frame in frames.frames]
        content = {"sizes": np.array(list(map(len, jpegs)))}
        content["jpegs"] = np.frombuffer(b"".join(jpegs), np.uint8)
        content["times"] = np.array(frames.times, np.float32)
        digest = hashlib.sha256(b"".join(array.tobytes() for array in content.values())).hexdigest()
        content |= {"note": np.array(frames.note or ""), "digest": np.array(digest)}
        np.savez(file := io.BytesIO(), **content)
        write_file(job.cache, file.getvalue())
    size, digest = int(content["sizes"].sum()), str(content["digest"])
    return Outcome(None, str(content["note"]) or None, size, digest)


def _read_cache(path: Location) -> dict[str, np.ndarray] | None:
    """Reads a cache file, or returns None if it is missing or corrupted (by a power failure)."""
    try:
        with np.load(io.BytesIO(read_file(path))) as arrays:
            content = {name: arrays[name] for name in ("sizes", "jpegs", "times", "note", "digest")}
        frames = b"".join(content[name].tobytes() for name in ("sizes", "jpegs", "times"))
        is_intact = hashlib.sha256(frames).hexdigest() == str(content["digest"])
        return content if is_intact else None
    except FileNotFoundError:
        return None
    except InputError:  # a bucket that cannot be reached
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def make_record(clip: Clip, cache: Location) -> dict[str, Any]:
    """Returns the record of a clip (see `data.builder`), from its cache file."""
    with np.load(io.BytesIO(read_file(cache))) as arrays:
        ends = np.cumsum(arrays["sizes"])
        jpegs = arrays["jpegs"].tobytes()
        frames = [jpegs[e - n : e] for e, n in zip(ends, arrays["sizes"], strict=True)]
        record = {"id": clip.id, "captions": list(clip.captions)}
        return record | {"frames": frames, "times": arrays["times"]}


def extract_all(
    jobs: Sequence[ClipJob], folder: Location, beam: BeamRunner | None
) -> list[Outcome]:
    """Extracts every job's clip: in worker processes, or on Beam with a shared `folder`."""
    groups = _group_by_fetch(jobs)
    if beam is not None:
        grouped = [[jobs[index] for index in group] for group in groups]
        results = map_on_beam(extract_group, grouped, folder, beam)
        pairs = zip(itertools.chain(*groups), itertools.chain(*results), strict=True)
        return [Outcome(*result) for _, result in sorted(pairs)]
    single = [group[0] for group in groups if len(group) == 1]
    several = [group for group in groups if len(group) > 1]
    outcomes, failures = [Outcome(CRASHED)] * len(jobs), 0

    def store(group: Sequence[int], results: list[Outcome] | None) -> None:
        nonlocal failures
        if results is None and len(group) > 1:
            single.extend(group)  # all but the clip that crashed can be read
            return
        for index, outcome in zip(group, results or [Outcome(CRASHED)], strict=True):
            outcomes[index] = outcome
            failures += outcome.failure is not None
            bar.update()
        bar.set_postfix(failed=failures, refresh=False)

    with progress(len(jobs), "reading videos", "clip") as bar:
        items = [[jobs[index] for index in group] for group in several]
        run_jobs(extract_group, items, lambda n, results: store(several[n], results))
        items = [jobs[index] for index in single]
        run_jobs(extract, items, lambda n, result: store([single[n]], result and [result]))
    return outcomes


def _group_by_fetch(jobs: Sequence[ClipJob]) -> list[list[int]]:
    """Returns groups of indices of jobs: all of a video in a bucket, else one of each."""
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for index, job in enumerate(jobs):
        groups[job.path if isinstance(job.path, BucketFile) else index].append(index)
    return list(groups.values())


def report_findings(
    output: Location,
    title: str,
    listing: Listing,
    paths: Sequence[VideoFile | None],
    unused: Iterable[str],
) -> None:
    """Writes findings.jsonl and prints the numbers of expected clips, found clips and findings.

    `paths` has the file of each clip, or None; `unused` names the video files without a clip.
    """
    pairs = zip(listing.clips, paths, strict=True)
    absent = [Finding("id without a file", clip.video, clip.split) for clip, p in pairs if not p]
    extra = [Finding("file that no clip uses", name) for name in unused]
    findings = [*listing.findings, *absent, *extra]
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
    output: Location, listing: Listing, outcomes: Sequence[Outcome], max_failures: float
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


def _write_lines(path: Location, entries: Iterable[Any]) -> None:
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    write_file(path, text.encode("utf-8", errors="surrogateescape"))
