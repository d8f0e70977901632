"""Samples frames from videos once and writes a data set for training and evaluation.

    python -m xclip_jax.prepare --dataset=captions --videos=clips/ \\
        --annotations=captions.csv --output=data/mine
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine

Killed and started again it goes on where it was. What could not be read is listed with reasons in
OUTPUT/failures.jsonl.
"""

import argparse
import collections
import functools
import hashlib
import json
import os
import shutil
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from xclip_jax.data import rendered
from xclip_jax.data.builder import SPLITS, dataset_folder, write_dataset
from xclip_jax.data.datasets import READERS, find_videos, locate
from xclip_jax.data.text import learn_tokenizer
from xclip_jax.data.video import VideoError, encode_jpeg, read_frames
from xclip_jax.errors import InputError, one_line_errors, run_command
from xclip_jax.progress import progress
from xclip_jax.workers import worker_pool


def prepare(annotations, videos, output, dataset="captions", image_size=224, max_failures=0.05):
    """Videos and annotations -> a data set under `output`; see the module's description.

    Args:
        annotations: the annotation file or folder, for the reader READERS[dataset].
        videos: folder that holds the video files, sub-folders included.
        output: folder to write; resumed if an earlier run of the same arguments was cut short.
        image_size: S, side of the stored frames in pixels.
        max_failures: share of the clips that may be unreadable, 0 to 1.

    Raises:
        InputError: bad annotations, too many failures, or `output` holds another data set.
    """
    output = Path(output)
    clips = READERS[dataset](Path(annotations))
    found = find_videos(videos)
    paths = [locate(clip.video, found) for clip in clips]
    _check_names(clips, paths)
    request = {"dataset": dataset, "image_size": image_size, "clips": _digest(clips)}
    work = output / "work"
    if _already_prepared(output, request):
        shutil.rmtree(work, ignore_errors=True)  # still there after a kill at the very end
        print(f"{output} is already prepared; nothing to do")
        return
    work.mkdir(parents=True, exist_ok=True)
    (work / "request.json").write_text(json.dumps(request, indent=1))
    (work / "request.json").replace(output / "request.json")  # whole or not at all
    jobs = [_job(work, clip, path, image_size) for clip, path in zip(clips, paths, strict=True)]
    outcomes = _extract_all(jobs)
    kept = [(clip, job) for clip, job, bad in zip(clips, jobs, outcomes, strict=True) if not bad[0]]
    _report_failures(output, clips, outcomes, max_failures)
    learn_tokenizer(c for clip in clips if clip.split == "train" for c in clip.captions).save(
        output / "tokenizer"
    )
    _write(output, kept, image_size)
    shutil.rmtree(work)


def prepare_rendered(output, image_size, **counts):
    """Renders the demo's scenes under `output` and prepares them; `counts` as `rendered.make`."""
    scenes = Path(output) / "scenes"
    rendered.make(scenes, **counts)
    prepare(scenes / "captions.jsonl", scenes / "videos", output, image_size=image_size)


def _digest(clips):
    return hashlib.sha256(repr(clips).encode()).hexdigest()[:16]


def _already_prepared(output, request):
    """Whether the data set is there and whole; raises if it is that of another request."""
    if not dataset_folder(output).is_dir():
        return False
    path = output / "request.json"
    if not path.is_file() or json.loads(path.read_text()) != request:
        raise InputError(
            f"{output} holds a data set of other annotations or image size; "
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


def _job(work, clip, path, image_size):
    """Arguments of `_extract`: the cache file is named after all that its content depends on."""
    if path is None:
        return None, None, clip.video, clip.start, clip.end, image_size
    status = path.stat()
    key = repr((str(path), status.st_size, status.st_mtime_ns, clip.start, clip.end, image_size))
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return work / name[:2] / f"{name}.npz", path, clip.video, clip.start, clip.end, image_size


def _extract(cache, path, video, start, end, image_size):
    """Reads the frames of one clip into its cache file. Returns (reason of failure, note)."""
    if path is None:
        return f"no video file answers to {video!r}", None
    if cache.is_file():
        return None, str(np.load(cache)["note"]) or None
    try:
        frames = read_frames(path, image_size, start, end)
    except VideoError as error:
        return str(error), None
    jpegs = [encode_jpeg(frame) for frame in frames.frames]
    cache.parent.mkdir(exist_ok=True)
    partial = cache.with_suffix(f".{os.getpid()}.part")
    with partial.open("wb") as file:  # renamed when whole: a kill leaves no half file
        np.savez(
            file,
            sizes=np.array([len(jpeg) for jpeg in jpegs]),
            jpegs=np.frombuffer(b"".join(jpegs), np.uint8),
            times=np.array(frames.times, np.float32),
            note=np.array(frames.note or ""),
        )
    partial.replace(cache)
    return None, frames.note


def _extract_all(jobs):
    """`_extract` of every job on all cores, in order, with a progress bar.

    A decoder that brings its process down takes only its own clip with it: the jobs that were
    running then are tried again, each in a process of its own.
    """
    outcomes = [None] * len(jobs)
    todo = collections.deque(range(len(jobs)))
    with progress(len(jobs), "reading videos", "clip") as bar:
        while todo:
            suspects = _run_pool(jobs, todo, outcomes, bar)
            for index in suspects:
                left = _run_pool(jobs, collections.deque([index]), outcomes, bar)
                if left:
                    outcomes[index] = "the decoder crashed on this file", None
                    bar.update()
    return outcomes


def _run_pool(jobs, todo, outcomes, bar):
    """Works off `todo` (emptied as it goes); returns the jobs in flight if the pool broke."""
    at_once = 2 * os.cpu_count()
    with worker_pool(len(todo)) as pool:
        running = {}
        while todo or running:
            try:
                while todo and len(running) < at_once:
                    running[pool.submit(_extract, *jobs[todo[0]])] = todo[0]
                    todo.popleft()
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                results = [(future, future.result()) for future in done]
            except BrokenProcessPool:  # from submit as well, if it broke in the meantime
                return list(running.values())
            for future, outcome in results:
                outcomes[running.pop(future)] = outcome
                bar.update()
                failures = sum(1 for outcome in outcomes if outcome and outcome[0])
                bar.set_postfix(failed=failures, refresh=False)
    return []


def _report_failures(output, clips, outcomes, max_failures):
    """Writes failures.jsonl, prints the counts; InputError if too many clips failed."""
    lines, failed = [], 0
    for clip, (reason, note) in zip(clips, outcomes, strict=True):
        if reason or note:
            failed += bool(reason)
            entry = {"id": clip.id, "reason": reason or note, "kept": not reason}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    path = output / "failures.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    print(
        f"{len(clips) - failed} of {len(clips)} clips read"
        + (f", {len(lines) - failed} of them only in part" if len(lines) > failed else "")
        + (f"; {failed} failed" if failed else "")
        + (f" (listed in {path})" if lines else "")
    )
    if failed / len(clips) > max_failures or failed == len(clips):
        first = json.loads(next(line for line in lines if not json.loads(line)["kept"]))
        what = f"{failed} of {len(clips)} clips failed"
        if failed < len(clips):
            what += f", more than --max_failures={max_failures:g} allows"
        what += f"; the first is {first['id']}: {first['reason']}"
        raise InputError(f"{what}; all are in {path}")


def _write(output, kept, image_size):
    """Turns the cache files into the TFDS data set, split by split, in the annotations' order."""
    records, counts = {}, {}
    for split in SPLITS:
        members = [(clip, job[0]) for clip, job in kept if clip.split == split]
        if members:
            records[split] = [functools.partial(_record, *member) for member in members]
            counts[split] = [len(clip.captions) for clip, _ in members]
    print(f"writing {', '.join(f'{split}: {len(c)} clips' for split, c in counts.items())}")
    write_dataset(output, records, counts, image_size)
    print(f"prepared {output}")


def _record(clip, cache):
    """One clip as the builder stores it, from its cache file."""
    with np.load(cache) as arrays:
        ends = np.cumsum(arrays["sizes"])
        jpegs = arrays["jpegs"].tobytes()
        return {
            "id": clip.id,
            "captions": list(clip.captions),
            "frames": [jpegs[e - n : e] for e, n in zip(ends, arrays["sizes"], strict=True)],
            "times": arrays["times"],
        }


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m xclip_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", required=True, choices=[*READERS, "rendered"], help="kind of annotations")
    add("--videos", type=Path, help="folder of video files, searched with its sub-folders")
    add("--annotations", type=Path, help="captions: a .json, .jsonl or .csv file")
    add("--output", required=True, type=Path, help="folder to write the data set to")
    add("--image_size", type=int, default=224, help="side of the frames in pixels (default 224)")
    add(
        "--max_failures",
        type=float,
        default=0.05,
        help="share of the clips that may be unreadable, 0 to 1 (default 0.05)",
    )
    return parser


def main(argv=None):
    """The command line."""
    args = _parser().parse_args(argv)
    with one_line_errors():
        if not 0 <= args.max_failures <= 1:
            raise InputError(f"--max_failures={args.max_failures:g}: must be from 0 to 1")
        if not 1 <= args.image_size <= 4096:
            raise InputError(f"--image_size={args.image_size}: must be from 1 to 4096")
        if args.dataset == "rendered":
            prepare_rendered(args.output, args.image_size)
            return
        for name in ("videos", "annotations"):
            if getattr(args, name) is None:
                raise InputError(f"--{name} is required with --dataset={args.dataset}")
        prepare(
            args.annotations,
            args.videos,
            args.output,
            args.dataset,
            args.image_size,
            args.max_failures,
        )


if __name__ == "__main__":
    run_command(main)
