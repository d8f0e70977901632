r"""Samples frames from videos once and writes a data set for training and evaluation.

    python -m xclip_jax.prepare --dataset=captions --videos=clips/ \
        --annotations=captions.csv --output=data/mine
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine

    python -m xclip_jax.prepare --dataset=msrvtt --videos=MSRVTT/ \
        --annotations=msrvtt_data/ --output=data/msrvtt
    python -m xclip_jax.main --config=configs/msrvtt.py

docs/data.md says what to download for each benchmark. Frames are by default those of CLIP; for
other models pass --model, or set --image_size, --resize, --interpolation and --spread. A run that
was killed resumes when started again. OUTPUT/failures.jsonl lists the clips that could not be read,
with reasons, and OUTPUT/findings.jsonl the inconsistencies in annotations and files.

Videos, annotations and output may be in a bucket (s3://BUCKET/FOLDER, gs://BUCKET/FOLDER), with the
usual environment variables for access: docs/data.md, "Buckets".
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from xclip_jax import integrity
from xclip_jax.buckets import (
    BucketPath,
    Location,
    new_folder,
    parse_location,
    read_file,
    remove_stale_folders,
    remove_tree,
    scratch_folder,
    write_file,
)
from xclip_jax.cli import (
    CommandParser,
    InputError,
    PathLike,
    check_local,
    first_line,
    one_line_errors,
    run_command,
)
from xclip_jax.data import extraction, rendered
from xclip_jax.data.annotations import SPLITS, Clip, Listing
from xclip_jax.data.benchmarks import DATASETS
from xclip_jax.data.builder import (
    DatasetSettings,
    PendingRecord,
    check_dataset_path,
    dataset_folder,
    is_complete,
    write_dataset,
)
from xclip_jax.data.preprocess import FrameFormat, frame_format
from xclip_jax.data.text import learn_tokenizer
from xclip_jax.workers import BeamRunner, parse_beam_flags

ANNOTATION_SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".pkl")


def prepare(
    annotations: PathLike | BucketPath,
    videos: PathLike | BucketPath,
    output: PathLike | BucketPath,
    *,
    max_failures: float = 0.05,
    beam_runner: BeamRunner | None = None,
    **options: Any,
) -> None:
    """Writes a data set of videos and annotations under `output`.

    Each of the three may be on this machine or in a bucket (s3://BUCKET/FOLDER, gs://...).

    Args:
        annotations: the captions file, or the folder of a benchmark's released files.
        videos: folder of the video files, searched with its sub-folders.
        output: folder to write; an interrupted run with the same arguments is resumed.
        max_failures: fraction of the clips that may be unreadable or have no captions, 0 to 1.
        beam_runner: see `workers.parse_beam_flags`; None: this machine.
        **options: fields of DatasetSettings except `paragraphs` and `expected`.
    """
    output, videos = parse_location("--output", output), parse_location("--videos", videos)
    annotations, work = parse_location("--annotations", annotations), output / "work"
    remove_stale_folders()
    settings, listing = _read_annotations(DatasetSettings(**options), annotations)
    clips, folder = listing.clips, extraction.VideoFolder(videos)
    if not clips:
        download = DATASETS[settings.dataset].download
        raise InputError(f"{annotations}: no id has captions; {download}")
    paths = _locate_videos(listing, folder, is_path=settings.dataset == "captions")
    if _is_prepared(output, _describe_request(settings, clips, paths)):
        return
    title = f"{settings.dataset} {settings.variant}".strip()
    extraction.report_findings(output, title, listing, paths, folder.find_unused(paths))
    limits, pairs = (settings.format, settings.max_seconds), zip(clips, paths, strict=True)
    jobs = [extraction.make_job(clip, path, *limits, work) for clip, path in pairs]
    outcomes = extraction.extract_all(jobs, work, beam_runner)
    extraction.report_failures(output, listing, outcomes, max_failures)
    texts = (text for clip in clips if clip.split == "train" for text in clip.captions)
    with new_folder(output / "tokenizer") as tokenizer:
        learn_tokenizer(texts).save(tokenizer)
        integrity.write_digests(tokenizer)
    records: dict[str, list[PendingRecord]] = {}
    for clip, job, outcome in zip(clips, jobs, outcomes, strict=True):
        if job.cache and not outcome.failure:
            make = functools.partial(extraction.make_record, clip, job.cache)
            digest = repr((clip.id, clip.captions, outcome.digest))
            record = PendingRecord(make, len(clip.captions), digest, outcome.size)
            records.setdefault(clip.split, []).append(record)
    records, counts = {s: records[s] for s in SPLITS if s in records}, listing.counts()
    print("writing " + ", ".join(f"{s}: {len(r)} of {counts[s]} clips" for s, r in records.items()))
    write_dataset(output, records, settings, beam_runner)
    print(f"prepared {output}")
    remove_tree(work)


def _locate_videos(
    listing: Listing, folder: extraction.VideoFolder, *, is_path: bool
) -> list[extraction.VideoFile | None]:
    """Returns the file of each clip, or raises InputError if a file has two names."""
    paths = [folder.locate(clip.video, is_path=is_path) for clip in listing.clips]
    names: dict[Any, str] = {}
    for clip, path in zip(listing.clips, paths, strict=True):
        if (name := names.setdefault(path or clip.video, clip.video)) != clip.video:
            both = f"{name!r} and {clip.video!r}"
            raise InputError(f"videos {both} are the same file {path}: use the same name for both")
    return paths


def _describe_request(
    settings: DatasetSettings, clips: Sequence[Clip], paths: Sequence[extraction.VideoFile | None]
) -> dict[str, Any]:
    """Returns the content of request.json, which differs if the data set would."""
    request = {"dataset": settings.dataset, "variant": settings.variant}
    request |= {**settings.format._asdict(), "max_seconds": settings.max_seconds}
    files = [path and (path.name, extraction.file_size(path)) for path in paths]
    for name, value in (("annotations", clips), ("videos", files)):
        request[name] = hashlib.sha256(repr(value).encode()).hexdigest()[:16]
    return request


def render_if_missing(config: Any) -> None:
    """Prepares the rendered data of a config that requires it, unless it exists.

    Raises InputError if it was rendered by a version that draws other videos or captions.
    """
    path = check_dataset_path(config.data.path)
    if config.data.rendered and dataset_folder(path).is_dir():
        rendered.check_recipe(path / "scenes", f"delete {path} or set another config.data.path")
    elif config.data.rendered:
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / "render.lock"):  # one process renders, the others wait
            prepare_rendered(path, frame_format(config.model), num_train=config.data.rendered)


def prepare_rendered(output: str | Path, format: FrameFormat, **counts: int) -> None:
    """Renders the demo's scenes under `output` and prepares them.

    `counts` are num_train, num_val and num_test of `rendered.render_dataset`.
    """
    scenes = check_local("--output", output) / "scenes"
    rendered.render_dataset(scenes, **counts)
    prepare(scenes / "captions.jsonl", scenes / "videos", output, **format._asdict())


def _read_annotations(
    old: DatasetSettings, annotations: Location
) -> tuple[DatasetSettings, Listing]:
    """Returns the settings with the variant, by default the first, and the annotations' clips."""
    dataset, variant, variants = old.dataset, old.variant, DATASETS[old.dataset].variants
    if variant and variant not in variants:
        allowed = f"one of {', '.join(variants)}" if variants else "omitted (no variants)"
        raise InputError(f"--split={variant}: with --dataset={dataset} it must be {allowed}")
    chosen = [variant or variants[0]] if variants else []
    with _local_annotations(annotations) as path:
        listing = DATASETS[dataset].read(path, *chosen)
    changes = {"variant": "".join(chosen), "paragraphs": listing.paragraphs}
    expected = listing.expected or dict(listing.counts())
    return dataclasses.replace(old, expected=expected, **changes), listing


@contextlib.contextmanager
def _local_annotations(annotations: Location) -> Iterator[Path]:
    """Yields annotations of this machine: the path, or copies of those in a bucket.

    An InputError in the body names the URI in place of the copy.
    """
    if isinstance(annotations, Path):
        yield annotations
        return
    with scratch_folder() as folder:
        local = folder / annotations.name
        if annotations.is_file():
            files = {local: annotations}
        else:
            local.mkdir()
            files = {local / file.name: file for file in annotations.list_files(recursive=False)}
        for copy, file in files.items():
            if copy.suffix in ANNOTATION_SUFFIXES:
                copy.write_bytes(read_file(file))
        try:
            yield local
        except InputError as error:
            raise InputError(str(error).replace(str(local), str(annotations))) from None


def _is_prepared(output: Location, request: dict[str, Any]) -> bool:
    """Returns True if the data set exists and fits the request, or stores the request."""
    path, work = output / "request.json", output / "work"
    if not is_complete(output):
        if isinstance(work, Path):
            work.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(request, indent=1))
        return False
    try:
        before = dict(json.loads(read_file(path)))
    except FileNotFoundError:
        before = {}
    except InputError:  # a bucket that cannot be reached
        raise
    except (ValueError, TypeError) as error:
        advice = f"choose another --output or delete {output}"
        raise InputError(f"{path} is corrupted ({first_line(error)}): {advice}") from None
    # Earlier versions made these.
    before = {"resize": "crop", "interpolation": "bicubic", "spread": 0} | before
    if changed := [name for name, value in request.items() if before.get(name) != value]:
        problem = f"{output} holds a data set prepared with other {', '.join(changed)}"
        raise InputError(f"{problem}; choose another --output or delete it")
    remove_tree(work)  # remains if a run was killed at its very end
    print(f"{output} is already prepared; nothing to do")
    return True


def _choose_format(model: Path | None, given: dict[str, Any]) -> FrameFormat:
    """Returns the format of a model directory, else the default with the `given` fields."""
    if model is None:
        if not 1 <= (side := given.get("image_size", 224)) <= 4096:
            raise InputError(f"--image_size={side}: must be from 1 to 4096")
        if not 1 <= (number := given.get("spread", 1)) <= 1024:
            raise InputError(f"--spread={number}: must be from 1 to 1024")
        return FrameFormat(**given)
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        raise InputError(f"--model={model} sets the frames: it excludes {flags}")
    from xclip_jax.checkpoint import model_folder, read_config  # imports JAX, which takes seconds

    _, config = read_config(model_folder(model))
    if config.towers == "text":
        raise InputError(f"--model={model} has a text tower only, which takes no frames")
    format = frame_format(config)
    print(f"frames of {model}: {format}")
    return format


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    prog = "python -m xclip_jax.prepare"
    parser = CommandParser(prog=prog, description=__doc__, allow_abbrev=True)
    add = parser.add_argument
    add("--dataset", required=True, choices=[*DATASETS, "rendered"], help="kind of annotations")
    where = "on this machine, s3://BUCKET/... or gs://BUCKET/..."
    add("--videos", help=f"folder of video files, searched with its sub-folders; {where}")
    files = f"a file of captions, or the folder of a benchmark's files; {where}"
    add("--annotations", help=files)
    add("--output", required=True, help=f"folder to write the data set to; {where}")
    variants = (f"{name}: {', '.join(d.variants)}" for name, d in DATASETS.items() if d.variants)
    add("--split", default="", help=f"which split ({'; '.join(variants)}; default: the first)")
    frames = "model directory for whose format frames are made, in place of the next four options"
    add("--model", type=Path, help=frames)
    add("--image_size", type=int, help="side of the frames in pixels (default 224)")
    frames = "centre crop after the short side was resized, or both sides resized (default crop)"
    add("--resize", choices=["crop", "squash"], help=frames)
    frames = "interpolation of the resize (default bicubic)"
    add("--interpolation", choices=["bicubic", "bilinear", "lanczos"], help=frames)
    frames = "number of frames, spread over the whole clip (default: one frame a second)"
    add("--spread", type=int, help=frames)
    failures = "fraction of the clips that may be unreadable, 0 to 1 (default 0.05)"
    add("--max_failures", type=float, default=0.05, help=failures)
    add("--max_seconds", type=float, help="second up to which clips are read (DiDeMo: 31)")
    beam = "runner of Apache Beam, e.g. FlinkRunner; workers must see all files at the same paths"
    add("--beam_runner", help=beam)
    add("--beam_options", default="", help="the runner's own flags, in one string")
    args = parser.parse_args(argv)
    with one_line_errors():
        if not 0 <= args.max_failures <= 1:
            raise InputError(f"--max_failures={args.max_failures:g}: must be from 0 to 1")
        stated = {name: getattr(args, name) for name in FrameFormat._fields}
        stated = {name: value for name, value in stated.items() if value is not None}
        format = _choose_format(args.model, stated)
        if args.max_seconds is not None and not 0 <= args.max_seconds < float("inf"):
            raise InputError(f"--max_seconds={args.max_seconds:g}: must be at least 0")
        if args.dataset == "rendered":
            for name in ("videos", "annotations", "split", "max_seconds", "beam_runner"):
                if getattr(args, name):
                    raise InputError(f"--{name} is not allowed with --dataset=rendered")
            prepare_rendered(args.output, format)
            return
        if args.beam_options and not args.beam_runner:
            raise InputError("--beam_options requires --beam_runner")
        for name in ("videos", "annotations"):
            if getattr(args, name) is None:
                raise InputError(f"--{name} is required with --dataset={args.dataset}")
        runner = parse_beam_flags(args.beam_runner, args.beam_options) if args.beam_runner else None
        options = vars(args) | {"variant": args.split, "beam_runner": runner} | format._asdict()
        del options["split"], options["beam_options"], options["model"]
        prepare(**options)


if __name__ == "__main__":
    run_command(main)
