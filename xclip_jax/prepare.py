r"""Samples frames from videos once and writes a data set for training and evaluation.

    python -m xclip_jax.prepare --dataset=captions --videos=clips/ \
        --annotations=captions.csv --output=data/mine
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine

    python -m xclip_jax.prepare --dataset=msrvtt --videos=MSRVTT/ \
        --annotations=msrvtt_data/ --output=data/msrvtt
    python -m xclip_jax.main --config=configs/msrvtt.py

docs/data.md says what to download for each benchmark. A run that was killed resumes when started
again. OUTPUT/failures.jsonl lists the clips that could not be read, with reasons, and
OUTPUT/findings.jsonl the inconsistencies in annotations and files.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from xclip_jax.cli import InputError, one_line_errors, run_command
from xclip_jax.data import rendered
from xclip_jax.data.annotations import SPLITS, Clip, Listing
from xclip_jax.data.beam import BeamRunner, parse_beam_flags
from xclip_jax.data.benchmarks import DATASETS
from xclip_jax.data.builder import DatasetSettings, PendingRecord, dataset_folder, write_dataset
from xclip_jax.data.extraction import (
    ClipJob,
    Outcome,
    extract_all,
    make_job,
    make_record,
    report_failures,
    report_findings,
)
from xclip_jax.data.locate import VideoFolder
from xclip_jax.data.text import learn_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The inputs that determine a data set, as stored in OUTPUT/request.json.

    Attributes:
        dataset, variant, image_size, max_seconds: see `prepare`.
        annotations, videos: digests.
    """

    dataset: str
    variant: str
    image_size: int
    max_seconds: float | None
    annotations: str
    videos: str


def prepare(
    annotations: str | os.PathLike,
    videos: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dataset: str = "captions",
    variant: str = "",
    image_size: int = 224,
    max_seconds: float | None = None,
    max_failures: float = 0.05,
    beam_runner: BeamRunner | None = None,
) -> None:
    """Writes a data set of videos and annotations under `output`.

    Args:
        annotations: the captions file, or the folder of a benchmark's released files.
        videos: folder of the video files, searched with its sub-folders.
        output: folder to write; an interrupted run with the same arguments is resumed.
        dataset: key of DATASETS.
        variant: one of its variants; "": the first.
        image_size: S, side of the stored frames in pixels.
        max_seconds: the last second read of each clip; None: all are read.
        max_failures: fraction of the clips that may be unreadable or have no captions, 0 to 1.
        beam_runner: see `data.beam.parse_beam_flags`; None: this machine.

    Raises:
        InputError: invalid annotations, too many failures, or `output` holds another data set.
    """
    output = Path(output)
    variant, listing = _read_annotations(dataset, variant, Path(annotations))
    clips, folder = listing.clips, VideoFolder(videos)
    if not clips:
        raise InputError(f"{annotations}: no id has captions; {DATASETS[dataset].download}")
    paths = [folder.locate(clip.video, is_path=dataset == "captions") for clip in clips]
    _check_names(clips, paths)
    request = Request(
        dataset=dataset,
        variant=variant,
        image_size=image_size,
        max_seconds=max_seconds,
        annotations=_digest(clips),
        videos=_digest([path and (path.name, path.stat().st_size) for path in paths]),
    )
    work = output / "work"
    if _is_prepared(output, request):
        shutil.rmtree(work, ignore_errors=True)  # remains if a run was killed at its very end
        print(f"{output} is already prepared; nothing to do")
        return
    _store_request(request, work, output)
    title = f"{dataset} {variant}".strip()
    report_findings(output, title, listing, paths=paths, files=folder.files)
    jobs = [_make_job(work, clip, p, request) for clip, p in zip(clips, paths, strict=True)]
    outcomes = extract_all(jobs, work, beam_runner)
    report_failures(output, listing, outcomes, max_failures)
    texts = (text for clip in clips if clip.split == "train" for text in clip.captions)
    learn_tokenizer(texts).save(output / "tokenizer")
    records = _pending_records(clips, jobs, outcomes)
    _write_records(output, records, listing, request, beam_runner)
    print(f"prepared {output}")
    shutil.rmtree(work)


def render_if_missing(config: Any) -> None:
    """Prepares the rendered data of a config that requires it, unless it exists."""
    path = Path(config.data.path)
    if config.data.rendered and not dataset_folder(path).is_dir():
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / "render.lock"):  # one process renders, the others wait
            side = config.model.vision.image_size
            prepare_rendered(path, side, num_train=config.data.rendered)


def prepare_rendered(output: str | os.PathLike, image_size: int, **counts: int) -> None:
    """Renders the demo's scenes under `output` and prepares them.

    `counts` are num_train, num_val and num_test of `rendered.render_dataset`.
    """
    scenes = Path(output) / "scenes"
    rendered.render_dataset(scenes, **counts)
    prepare(scenes / "captions.jsonl", scenes / "videos", output, image_size=image_size)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _is_prepared(output: Path, request: Request) -> bool:
    """Returns True if the data set exists, or raises InputError if its request differs."""
    if not dataset_folder(output).is_dir():
        return False
    path = output / "request.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    changed = [k for k, value in dataclasses.asdict(request).items() if before.get(k) != value]
    if changed:
        raise InputError(
            f"{output} holds a data set prepared with other {', '.join(changed)}; "
            "choose another --output or delete it"
        )
    return True


def _store_request(request: Request, work: Path, output: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    (work / "request.json").write_text(json.dumps(dataclasses.asdict(request), indent=1))
    (work / "request.json").replace(output / "request.json")  # atomic


def _check_names(clips: Sequence[Clip], paths: Sequence[Path | None]) -> None:
    """Raises InputError if two names, such as a.mp4 and a, refer to the same file."""
    names: dict[Any, str] = {}
    for clip, path in zip(clips, paths, strict=True):
        name = names.setdefault(path or clip.video, clip.video)
        if name != clip.video:
            both = f"{name!r} and {clip.video!r}"
            raise InputError(f"videos {both} are the same file {path}: use the same name for both")


def _read_annotations(dataset: str, variant: str, annotations: Path) -> tuple[str, Listing]:
    """Returns the variant, by default the first, and the clips of the annotations."""
    variants = DATASETS[dataset].variants
    if variant and variant not in variants:
        allowed = f"one of {', '.join(variants)}" if variants else "omitted: it has no variants"
        raise InputError(f"--split={variant}: with --dataset={dataset} it must be {allowed}")
    if not variants:
        return "", DATASETS[dataset].read(annotations)
    variant = variant or variants[0]
    return variant, DATASETS[dataset].read(annotations, variant)


def _make_job(work: Path, clip: Clip, path: Path | None, request: Request) -> ClipJob:
    end = clip.end
    if request.max_seconds is not None:
        latest = (clip.start or 0) + request.max_seconds
        end = latest if end is None else min(end, latest)
    return make_job(
        clip.video, path, image_size=request.image_size, folder=work, start=clip.start, end=end
    )


def _pending_records(
    clips: Sequence[Clip], jobs: Sequence[ClipJob], outcomes: Sequence[Outcome]
) -> dict[str, list[PendingRecord]]:
    """Returns the records of the clips that were read, by split, in the annotations' order."""
    records: dict[str, list[PendingRecord]] = {}
    for split in SPLITS:
        for clip, job, outcome in zip(clips, jobs, outcomes, strict=True):
            if clip.split == split and job.cache and not outcome.failure:
                make = functools.partial(make_record, clip.id, clip.captions, job.cache)
                digest = repr((clip.id, clip.captions, outcome.digest))
                record = PendingRecord(make, len(clip.captions), digest, outcome.size)
                records.setdefault(split, []).append(record)
    return records


def _write_records(
    output: Path,
    records: dict[str, list[PendingRecord]],
    listing: Listing,
    request: Request,
    beam_runner: BeamRunner | None,
) -> None:
    counts = listing.counts()
    print("writing " + ", ".join(f"{s}: {len(r)} of {counts[s]} clips" for s, r in records.items()))
    settings = DatasetSettings(
        dataset=request.dataset,
        variant=request.variant,
        image_size=request.image_size,
        paragraphs=listing.paragraphs,
        max_seconds=request.max_seconds,
        expected=listing.expected or dict(counts),
    )
    write_dataset(output, records, settings, beam_runner)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xclip_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", required=True, choices=[*DATASETS, "rendered"], help="kind of annotations")
    add("--videos", type=Path, help="folder of video files, searched with its sub-folders")
    add(
        "--annotations",
        type=Path,
        help="captions: a .json, .jsonl or .csv file; a benchmark: the folder of its files",
    )
    add("--output", required=True, type=Path, help="folder to write the data set to")
    variants = (f"{name}: {', '.join(d.variants)}" for name, d in DATASETS.items() if d.variants)
    add("--split", default="", help=f"which split ({'; '.join(variants)}; default: the first)")
    add("--image_size", type=int, default=224, help="side of the frames in pixels (default 224)")
    add(
        "--max_failures",
        type=float,
        default=0.05,
        help="fraction of the clips that may be unreadable, 0 to 1 (default 0.05)",
    )
    add(
        "--max_seconds",
        type=float,
        help="read clips up to this second (DiDeMo in the literature: 31); default: the whole clip",
    )
    add(
        "--beam_runner",
        help="run on Apache Beam (DirectRunner, DataflowRunner, FlinkRunner, SparkRunner, ...); "
        "all workers must see the videos and the output under the same paths",
    )
    add("--beam_options", default="", help="the runner's own flags, in one string")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _parser().parse_args(argv)
    with one_line_errors():
        if not 0 <= args.max_failures <= 1:
            raise InputError(f"--max_failures={args.max_failures:g}: must be from 0 to 1")
        if not 1 <= args.image_size <= 4096:
            raise InputError(f"--image_size={args.image_size}: must be from 1 to 4096")
        if args.max_seconds is not None and not 0 <= args.max_seconds < float("inf"):
            raise InputError(f"--max_seconds={args.max_seconds:g}: must be at least 0")
        if args.dataset == "rendered":
            for name in ("videos", "annotations", "split", "max_seconds", "beam_runner"):
                if getattr(args, name):
                    raise InputError(f"--{name} is not allowed with --dataset=rendered")
            prepare_rendered(args.output, args.image_size)
            return
        if args.beam_options and not args.beam_runner:
            raise InputError("--beam_options requires --beam_runner")
        for name in ("videos", "annotations"):
            if getattr(args, name) is None:
                raise InputError(f"--{name} is required with --dataset={args.dataset}")
        runner = parse_beam_flags(args.beam_runner, args.beam_options) if args.beam_runner else None
        prepare(
            args.annotations,
            args.videos,
            args.output,
            dataset=args.dataset,
            variant=args.split,
            image_size=args.image_size,
            max_seconds=args.max_seconds,
            max_failures=args.max_failures,
            beam_runner=runner,
        )


if __name__ == "__main__":
    run_command(main)
