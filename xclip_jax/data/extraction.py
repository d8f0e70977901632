"""Reading of clips into cache files, on all local cores or on Beam, and reports of failures."""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from xclip_jax.cli import InputError, progress
from xclip_jax.data.annotations import Finding, Listing
from xclip_jax.data.video import VideoError, encode_jpeg, read_frames
from xclip_jax.workers import run_jobs

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

CRASHED = "the decoder crashed on this file"
# (runner, options) of Apache Beam, which is optional.
BeamRunner: TypeAlias = "tuple[str, PipelineOptions]"


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
    """Returns a job whose cache file, below `folder`, is named by all it depends on."""
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


def extract_all(jobs: Sequence[ClipJob]) -> list[Outcome]:
    """Runs `extract` on every job, in worker processes, with a progress bar."""
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


# Apache Beam: many machines that see the same folders under the same paths


def beam_pipeline(runner: str, options: str) -> BeamRunner:
    """Returns (runner, PipelineOptions) from the two flags of the command line.

    Args:
        runner: Beam's name, such as DirectRunner, DataflowRunner, FlinkRunner, SparkRunner.
        options: the runner's own flags in one string, such as "--project=p --region=r".

    Raises:
        InputError: Apache Beam is not installed, or the runner is unknown.
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners import create_runner
    except ImportError:
        raise InputError(
            "--beam_runner needs Apache Beam: pip install -e '.[beam]' (docs/data.md)"
        ) from None
    try:
        create_runner(runner)
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"--beam_runner={runner}: {error}") from None
    return runner, PipelineOptions(options.split())


def extract_all_on_beam(
    jobs: Sequence[ClipJob], folder: Path, pipeline: BeamRunner
) -> list[Outcome]:
    """Runs `extract` on every job on Apache Beam.

    Args:
        jobs: any number of jobs.
        folder: where the workers write the outcomes.
        pipeline: from `beam_pipeline`.
    """
    import apache_beam as beam

    prefix = folder / "outcomes"
    for old in folder.glob(f"{prefix.name}-*"):
        old.unlink()
    runner, options = pipeline
    try:
        with beam.Pipeline(runner=runner, options=options) as stages:
            (
                stages
                | beam.Create(list(enumerate(jobs)))
                | beam.Reshuffle()  # otherwise the runner may fuse all jobs into one bundle
                | beam.Map(_outcome_line)
                | beam.io.WriteToText(str(prefix))
            )
    except Exception as error:  # runners raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"Apache Beam's {runner} failed: {reason}") from error
    lines = [json.loads(line) for path in folder.glob(f"{prefix.name}-*") for line in path.open()]
    outcomes = {number: Outcome(**outcome) for number, outcome in lines}
    return [outcomes[number] for number in range(len(jobs))]


def _outcome_line(numbered_job: tuple[int, ClipJob]) -> str:
    number, job = numbered_job
    return json.dumps([number, dataclasses.asdict(extract(job))])


# Reports


def report_findings(
    output: Path,
    title: str,
    listing: Listing,
    *,
    paths: Sequence[Path | None],
    files: Iterable[Path],
) -> None:
    """Writes findings.jsonl; prints expected and found numbers of clips, and counts of findings.

    Args:
        output: folder of findings.jsonl.
        title: of the printed table.
        listing: all clips of the annotations.
        paths: the file of each clip, or None.
        files: all video files there are.
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
    """Writes failures.jsonl and prints the counts; InputError if too many clips failed."""
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
        raise InputError(f"{message}; all are in {path}")
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
                f"--max_failures={max_failures:g} allows; all are in {path}"
            )
