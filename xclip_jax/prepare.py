"""Samples frames from videos once and writes a data set for training and evaluation.

    python -m xclip_jax.prepare --dataset=captions --videos=clips/ \\
        --annotations=captions.csv --output=data/mine
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine

    python -m xclip_jax.prepare --dataset=msrvtt --videos=MSRVTT/ \\
        --annotations=msrvtt_data/ --output=data/msrvtt
    python -m xclip_jax.main --config=configs/msrvtt.py

What to download for each benchmark: docs/data.md. Killed and started again it goes on where it
was. What could not be read is listed with reasons in OUTPUT/failures.jsonl, what is odd about the
annotations and files in OUTPUT/findings.jsonl.
"""

import argparse
import functools
import hashlib
import json
import shutil
from pathlib import Path

from filelock import FileLock

from xclip_jax.cli import InputError, one_line_errors, run_command
from xclip_jax.data import rendered
from xclip_jax.data.annotations import SPLITS
from xclip_jax.data.benchmarks import DATASETS
from xclip_jax.data.builder import Pending, dataset_folder, write_dataset
from xclip_jax.data.extraction import (
    beam_pipeline,
    extract_all,
    extract_all_on_beam,
    make_job,
    make_record,
    report_failures,
    report_findings,
)
from xclip_jax.data.locate import VideoFolder
from xclip_jax.data.text import learn_tokenizer


def prepare(
    annotations,
    videos,
    output,
    dataset="captions",
    variant="",
    image_size=224,
    max_seconds=None,
    max_failures=0.05,
    beam=None,
):
    """Videos and annotations -> a data set under `output`; see the module's description.

    Args:
        annotations: the captions file, or the folder of a benchmark's released files.
        videos: folder that holds the video files, sub-folders included.
        output: folder to write; resumed if an earlier run of the same arguments was cut short.
        dataset: key of DATASETS.
        variant: one of its VARIANTS; "": the first.
        image_size: S, side of the stored frames in pixels.
        max_seconds: of each clip, the last second read; None: all of it.
        max_failures: share of the clips that may be unreadable or have no captions, 0 to 1.
        beam: from `data.beam.beam_pipeline`, to run on Apache Beam; None: this machine.

    Raises:
        InputError: bad annotations, too many failures, or `output` holds another data set.
    """
    output = Path(output)
    variant, listing = _read_annotations(dataset, variant, Path(annotations))
    clips, found = listing.clips, VideoFolder(videos)
    if not clips:
        raise InputError(f"{annotations}: no id there has captions; {DATASETS[dataset].download}")
    paths = [found.locate(clip.video, is_path=dataset == "captions") for clip in clips]
    _check_names(clips, paths)
    request = {
        "dataset": dataset,
        "variant": variant,
        "image_size": image_size,
        "max_seconds": max_seconds,
        "annotations": _digest(clips),
        "videos": _digest([path and (path.name, path.stat().st_size) for path in paths]),
    }
    work = output / "work"
    if _already_prepared(output, request):
        shutil.rmtree(work, ignore_errors=True)  # still there after a kill at the very end
        print(f"{output} is already prepared; nothing to do")
        return
    work.mkdir(parents=True, exist_ok=True)
    (work / "request.json").write_text(json.dumps(request, indent=1))
    (work / "request.json").replace(output / "request.json")  # whole or not at all
    report_findings(output, f"{dataset} {variant}".strip(), listing, paths=paths, files=found.files)
    jobs = [_job(work, *pair, image_size, max_seconds) for pair in zip(clips, paths, strict=True)]
    outcomes = extract_all_on_beam(jobs, work, beam) if beam else extract_all(jobs)
    report_failures(output, listing, outcomes, max_failures)
    learn_tokenizer(c for clip in clips if clip.split == "train" for c in clip.captions).save(
        output / "tokenizer"
    )
    read = [three for three in zip(clips, jobs, outcomes, strict=True) if not three[2].failure]
    _write(output, read, listing, request, beam)
    shutil.rmtree(work)


def render_if_missing(config):
    """The data of a config that renders its own, unless it is there; one process does it."""
    path = Path(config.data.path)
    if config.data.rendered and not dataset_folder(path).is_dir():
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / "render.lock"):
            side = config.model.vision.image_size
            prepare_rendered(path, side, num_train=config.data.rendered)


def prepare_rendered(output, image_size, **counts):
    """Renders the demo's scenes under `output` and prepares them; `counts` as `rendered.make`."""
    scenes = Path(output) / "scenes"
    rendered.make(scenes, **counts)
    prepare(scenes / "captions.jsonl", scenes / "videos", output, image_size=image_size)


def _digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _already_prepared(output, request):
    """Whether the data set is there and whole; raises if it is that of another request."""
    if not dataset_folder(output).is_dir():
        return False
    path = output / "request.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    changed = [name for name in request if before.get(name) != request[name]]
    if changed:
        raise InputError(
            f"{output} holds a data set prepared with other {', '.join(changed)}; "
            "choose another --output or delete it"
        )
    return True


def _check_names(clips, paths):
    """Raises if a file goes by two names, such as a.mp4 and a: it would be two videos."""
    names = {}
    for clip, path in zip(clips, paths, strict=True):
        name = names.setdefault(path or clip.video, clip.video)
        if name != clip.video:
            both = f"{name!r} and {clip.video!r}"
            raise InputError(f"videos {both} are the one file {path}: use one name for it")


def _read_annotations(dataset, variant, annotations):
    """(variant, Listing) of a data set's annotations."""
    variants = DATASETS[dataset].variants
    if variant and variant not in variants:
        allowed = f"one of {', '.join(variants)}" if variants else "left out: it has no variants"
        raise InputError(f"--split={variant}: with --dataset={dataset} it must be {allowed}")
    if not variants:
        return "", DATASETS[dataset].read(annotations)
    variant = variant or variants[0]
    return variant, DATASETS[dataset].read(annotations, variant)


def _job(work, clip, path, image_size, max_seconds):
    end = clip.end
    if max_seconds is not None:
        latest = (clip.start or 0) + max_seconds
        end = latest if end is None else min(end, latest)
    return make_job(clip.video, path, image_size=image_size, folder=work, start=clip.start, end=end)


def _write(output, read, listing, request, beam):
    """Turns the cache files into the TFDS data set, split by split, in the annotations' order."""
    pending = {}
    for split in SPLITS:
        for clip, job, outcome in read:
            if clip.split == split:
                make = functools.partial(make_record, clip.id, clip.captions, job.cache)
                digest = repr((clip.id, clip.captions, outcome.digest))
                this = Pending(make, len(clip.captions), digest, outcome.size)
                pending.setdefault(split, []).append(this)
    total = listing.counts()
    counts = (f"{split}: {len(p)} of {total[split]} clips" for split, p in pending.items())
    print(f"writing {', '.join(counts)}")
    write_dataset(
        output,
        pending,
        request["image_size"],
        request["dataset"],
        request["variant"],
        listing.paragraphs,
        listing.expected or dict(total),
        request["max_seconds"],
        beam,
    )
    print(f"prepared {output}")


def _parser():
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
        help="share of the clips that may be unreadable, 0 to 1 (default 0.05)",
    )
    add(
        "--max_seconds",
        type=float,
        help="read clips up to this second (DiDeMo in the literature: 31); default: all of them",
    )
    add(
        "--beam_runner",
        help="run on Apache Beam (DirectRunner, DataflowRunner, FlinkRunner, SparkRunner, ...); "
        "all workers must see the videos and the output under the same paths",
    )
    add("--beam_options", default="", help="the runner's own flags, in one text")
    return parser


def main(argv=None):
    """The command line."""
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
                    raise InputError(f"--{name} has no meaning with --dataset=rendered")
            prepare_rendered(args.output, args.image_size)
            return
        if args.beam_options and not args.beam_runner:
            raise InputError("--beam_options needs --beam_runner")
        for name in ("videos", "annotations"):
            if getattr(args, name) is None:
                raise InputError(f"--{name} is required with --dataset={args.dataset}")
        beam = args.beam_runner and beam_pipeline(args.beam_runner, args.beam_options)
        prepare(
            args.annotations,
            args.videos,
            args.output,
            args.dataset,
            args.split,
            args.image_size,
            args.max_seconds,
            args.max_failures,
            beam,
        )


if __name__ == "__main__":
    run_command(main)
