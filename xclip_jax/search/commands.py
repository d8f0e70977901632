"""What the commands of `python -m xclip_jax.search` do and print."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

from xclip_jax.cli import InputError, progress
from xclip_jax.search import recall as measured
from xclip_jax.search.export import write
from xclip_jax.search.index import Index
from xclip_jax.search.picture import draw_grid
from xclip_jax.search.serve import serve as run
from xclip_jax.search.store import exists


def index(location, videos, model, segment_seconds, shots, precision, prune):
    """Take in video files, and folders of them with their sub-folders.

    Run it again after a kill, or when files have come or changed: only what is new is read.
    """
    settings = {"segment_seconds": segment_seconds, "shots": shots, "precision": precision}
    settings = {name: value for name, value in settings.items() if value is not None}
    if exists(location):
        found = Index.open(location, model)
        for name, value in settings.items():
            if found.about[name] != value:
                raise InputError(
                    f"--{name}={value}: {location} was made with {found.about[name]}; "
                    "leave it out, or make another index"
                )
    elif model is None:
        raise InputError(f"--model is required: there is no index in {location} yet")
    else:
        found = Index.create(location, model, **settings)
    started = time.perf_counter()
    if found.retriever.tokenizer is None:
        print(
            "note: the model has no tokenizer: videos and pictures can be asked with, sentences "
            "only once it is converted again with --vocab",
            file=sys.stderr,
        )
    added = found.add(videos, prune)
    for title, files in (("read only in part", added.partial), ("unreadable", added.unreadable)):
        for path, reason in files.items():
            print(f"{title}: {_short(path)}: {reason}", file=sys.stderr)
    counts = [
        f"{added.files:,} files read in {time.perf_counter() - started:.0f} s",
        f"{added.unchanged:,} unchanged",
        *([f"{added.removed:,} replaced or removed"] if added.removed else []),
        *([f"{len(added.unreadable):,} unreadable"] if added.unreadable else []),
    ]
    print(", ".join(counts))
    print(f"{location}: {found.num_segments:,} segments of {found.num_files:,} files")
    if not found.num_segments:
        raise InputError("not one video could be read")


def query(
    location,
    text,
    video,
    image,
    captions,
    k,
    path,
    start,
    end,
    exhaustive,
    json,
    open,
    save_grid,
    model,
    candidates,
    rerank,
):
    """Find the segments that fit a sentence, or resemble a video or a picture."""
    given = [name for name in (text, video, image) if name is not None]
    if len(given) != 1:
        raise InputError("query wants one of a sentence, --video and --image")
    if captions and not video:
        raise InputError("--captions: ranked for a video, name it with --video")
    if exhaustive and text is None:
        raise InputError("--exhaustive: only with a sentence")
    if save_grid and not (Path(save_grid).suffix == ".png" and Path(save_grid).parent.is_dir()):
        raise InputError(f"--save_grid={save_grid}: must be a .png file in a folder that exists")
    found = Index.open(location, model, candidates, rerank)
    if captions:
        return _print_captions(found.rank_captions(video, _lines(captions))[:k], json)
    if text is not None:
        bar = progress(found.num_segments, "scoring", "segment") if exhaustive else None
        answer = found.query(text, k, path, start, end, exhaustive, bar)
        if bar is not None:
            bar.close()
    else:
        answer = found.similar(given[0], k, path, start, end)
    _print_answer(answer, json)
    if save_grid and answer.hits:
        draw_grid(save_grid, text or os.path.basename(given[0]), answer.hits, found.thumbnail)
        print(f"picture: {save_grid}", file=sys.stderr)
    if open and answer.hits:
        _play(answer[0])
    return None


def serve(location, host, port, open, model, candidates, rerank):
    """Show a page in the browser: search box, results, player, heat map.

    It serves the files of the index, and no others.
    """
    found = Index.open(location, model, candidates, rerank)
    found.warm_up()
    run(found, host, port, open)


def recall(location, sample, queries, json, model, candidates, rerank):
    """Report what share of the exhaustive ranking the funnel returns, and its times."""
    found = Index.open(location, model, candidates, rerank)
    sentences = _lines(queries)[:sample] if queries else measured.sentences(sample)
    result = measured.measure(found, sentences)
    print(_json(result) if json else measured.table(result))


def export(location, output):
    """Write the embeddings to a file for other programs."""
    found = Index.open(location)
    with progress(found.num_segments, "writing", "segment") as bar:
        write(found, output, bar)
    print(f"{output}: {found.num_segments:,} segments")


def _print_answer(answer, as_json):
    if as_json:
        print(_json(dataclasses.asdict(answer)))
        return
    if answer.note:
        print(f"note: {answer.note}", file=sys.stderr)
    if not answer.hits:
        print(f"nothing found: {answer.searched:,} segments fit the filters")
        return
    print(f"{'rank':>4}  {'score':>7}  {'best':>7}  {'segment':>15}  file")
    for hit in answer:
        span = f"{clock(hit.start)}-{clock(hit.end)}"
        at = clock(hit.second)
        print(f"{hit.rank:4}  {hit.score:7.2f}  {at:>7}  {span:>15}  {_short(hit.path)}")
    milliseconds = 1000 * sum(answer.seconds.values())
    took = f"{milliseconds:,.0f} ms, compiling included"
    print(f"{answer.searched:,} segments searched in {took}", file=sys.stderr)


def _print_captions(ranked, as_json):
    if as_json:
        print(_json([{"caption": caption, "score": score} for caption, score in ranked]))
        return
    print(f"{'rank':>4}  {'score':>7}  caption")
    for rank, (caption, score) in enumerate(ranked, 1):
        print(f"{rank:4}  {score:7.2f}  {caption}")


def _json(value):
    return json.dumps(value, ensure_ascii=False, indent=1)


def clock(seconds):
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _short(path):
    """The path from here if it lies below."""
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def _lines(path):
    """The lines of a text file that are not empty."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise InputError(f"{path}: no UTF-8 text") from None
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"{path}: no sentence in it")
    return lines


_PLAYERS = {
    "mpv": ["--start={second}", "{path}"],
    "vlc": ["--start-time={second}", "{path}"],
    "ffplay": ["-loglevel", "error", "-ss", "{second}", "{path}"],
}


def _play(hit):
    """Plays a file from the best second, in a player that can, or else from its start."""
    for player, options in _PLAYERS.items():
        if shutil.which(player):
            options = [option.format(second=hit.second, path=hit.path) for option in options]
            subprocess.Popen([player, *options])
            return
    webbrowser.open(Path(hit.path).as_uri())
    print(f"no mpv, VLC or ffplay here: go to {clock(hit.second)} yourself", file=sys.stderr)
