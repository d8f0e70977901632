"""Outputs of the command line: results as text or picture, embeddings, measured recall."""

import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from xclip_jax.cli import InputError, PathLike, atomic_file, check_local, progress
from xclip_jax.data.container import VideoError
from xclip_jax.data.video import read_still
from xclip_jax.report.canvas import BLUE, MUTED, Canvas, drawing_style
from xclip_jax.search.funnel import Answer, Hit
from xclip_jax.search.index import Index

GRID_COLUMNS, CELL_SIZE, MARGIN = 4, (240, 150), 18  # of a picture, in pixels
_PLAYERS = {  # players that can start at a given second
    "mpv": ["--start={second}", "{path}"],
    "vlc": ["--start-time={second}", "{path}"],
    "ffplay": ["-loglevel", "error", "-ss", "{second}", "{path}"],
}

_SUBJECTS = (
    "a man", "a woman", "two men", "a young girl", "a boy", "a group of people", "a dog", "a cat",
    "a crowd", "a singer", "a chef", "a football player", "a teacher", "children", "a red car",
    "an old woman", "a horse", "a band", "a cartoon character", "a reporter",
)  # fmt: skip
_VERBS = (
    "is talking", "is dancing", "is running", "is playing the guitar", "is cooking", "is driving",
    "is swimming", "is eating", "is jumping", "is singing", "is reading a book", "is laughing",
    "is riding a bicycle", "is fighting", "is drawing", "is falling", "is playing a game",
    "is walking slowly", "is opening a box", "is looking at the camera",
)  # fmt: skip
_PLACES = (
    "", " in a kitchen", " on a stage", " in the street", " on the beach", " in a park",
    " at night", " in the snow", " in front of a house", " in a room",
)  # fmt: skip


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    print(json.dumps(value, ensure_ascii=False, indent=1))


def print_answer(answer: Answer) -> None:
    """Prints the results of a search as a table."""
    if answer.note:
        print(f"note: {answer.note}", file=sys.stderr)
    if not answer.hits:
        print(f"no results: {answer.searched:,} segments pass the filters")
        return
    has_bias = any(hit.bias for hit in answer)  # results are ranked by score - bias
    bias = f"  {'bias':>7}" * has_bias
    print(f"{'rank':>4}  {'score':>7}{bias}  {'best':>7}  {'segment':>15}  file")
    for hit in answer:
        best, start, end = map(format_time, (hit.second, hit.start, hit.end))
        bias, path = f"  {hit.bias:7.2f}" * has_bias, shorten_path(hit.path)
        print(f"{hit.rank:4}  {hit.score:7.2f}{bias}  {best:>7}  {f'{start}-{end}':>15}  {path}")
    milliseconds = 1000 * sum(answer.seconds.values())
    text = f"{answer.searched:,} segments searched in {milliseconds:,.0f} ms, including compilation"
    print(text, file=sys.stderr)


def format_time(seconds: float) -> str:
    """Returns seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def shorten_path(path: str) -> str:
    """Returns the path relative to the current folder if it is below it."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def play(hit: Hit) -> None:
    """Opens the file at its best second, or from the start if no suitable player is installed."""
    for player, options in _PLAYERS.items():
        if shutil.which(player):
            options = [
                option.format(second=hit.second + hit.offset, path=hit.path) for option in options
            ]
            subprocess.Popen([player, *options])
            return
    webbrowser.open(Path(hit.path).as_uri())
    best = format_time(hit.second)
    print(f"mpv, VLC or ffplay is not installed: the best second is {best}", file=sys.stderr)


@drawing_style()
def draw_grid(path: Path, title: str, hits: list[Hit], thumbnail: Callable[[str], bytes]) -> None:
    """Writes a .png with the frame at the best second of each hit, of which there must be one.

    `thumbnail` returns the JPEG of a segment id, for files that can no longer be read.
    """
    width, height = CELL_SIZE
    columns, rows = max(2, min(GRID_COLUMNS, len(hits))), -(-len(hits) // GRID_COLUMNS)
    sheet_width = columns * (width + MARGIN) + MARGIN
    canvas = Canvas(sheet_width, 70 + rows * (height + 62))
    canvas.paragraph(MARGIN, 36, title, sheet_width - 2 * MARGIN, 2, size=17, weight="bold")
    for index, hit in enumerate(hits):
        try:
            jpeg = read_still(hit.path, hit.second)
        except (VideoError, OSError):
            jpeg = thumbnail(hit.id)
        row, column = divmod(index, GRID_COLUMNS)
        x, y = MARGIN + column * (width + MARGIN), 70 + row * (height + 62)
        with Image.open(io.BytesIO(jpeg)) as image:
            padded = ImageOps.pad(image.convert("RGB"), (2 * width, 2 * height), color="#11151d")
        canvas.image(np.asarray(padded), x, y, width, height)
        canvas.text(x, y + height + 15, f"{hit.rank}", 13, BLUE, weight="bold")
        canvas.text(x + width, y + height + 15, f"{hit.score - hit.bias:.2f}", 13, ha="right")
        canvas.text(x + 26, y + height + 15, format_time(hit.second), 13, weight="bold")
        name = os.path.basename(hit.path)
        canvas.paragraph(x, y + height + 34, name, width, size=11, color=MUTED)
    canvas.figure.savefig(path)


def export_segments(index: Index, path: PathLike) -> None:
    """Writes a .parquet or .npz file with one row per segment.

    Columns: id, path, size (bytes), mtime (ns), start, end, offset (seconds), count, times (F
    seconds), video (D) and frames (F x D numbers, in the .npz an N x F x D array); only the first
    `count` times and frames are real. An index may have `bias` and `weights` (F) too, see `Index`
    and VideoFeatures. Parquet is written in blocks, an .npz is built in memory.
    Raises InputError for another suffix or an empty index.
    """
    path = check_local("--output", path)
    if path.suffix not in (".parquet", ".npz"):
        raise InputError(f"--output={path}: must end in .parquet or .npz")
    if not len(index):
        raise InputError(f"the index {index.location} is empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = progress(len(index), "writing", "segment")
    with atomic_file(path) as partial, partial.open("wb") as file, bar:

        def read() -> Iterator[pa.Table]:
            for table in index.tables():
                yield table
                bar.update(len(table))

        if path.suffix == ".npz":
            table = pa.concat_tables(read())
            names = table.column_names
            arrays: dict[str, Any] = {name: np.stack(table[name].to_numpy()) for name in names}
            num_segments, dim = arrays["video"].shape
            arrays["frames"] = arrays["frames"].reshape(num_segments, -1, dim)
            np.savez(file, **arrays)
        else:
            tables = read()
            first = next(tables)
            with pq.ParquetWriter(file, first.schema) as writer:
                for table in itertools.chain([first], tables):
                    writer.write_table(table)


def sample_sentences(count: int) -> list[str]:
    """Returns `count` different sentences of common words, the same in every call."""
    parts = itertools.product(_SUBJECTS, _VERBS, _PLACES)
    sentences = [f"{subject} {verb}{place}" for subject, verb, place in parts]
    if count > len(sentences):
        raise InputError(f"--sample={count}: must be at most {len(sentences)} without --queries")
    return random.Random(0).sample(sentences, count)


def measure_recall(index: Index, texts: Sequence[str]) -> dict[str, Any]:
    """Runs each text through the funnel and the exhaustive search of a non-empty index.

    Returns the numbers of sentences, segments, candidates and rerank; `top_1` and `top_10`:
    percentages of the first and of the first ten exhaustive results that are in the funnel's first
    ten; `milliseconds`: {stage: {"p50", "p95"}}, including `total`.
    """
    if not len(index):
        raise InputError(f"the index {index.location} is empty")
    index.query(texts[0])  # compiles
    ids, seconds = [], []
    for text in texts:
        started = time.perf_counter()
        answer = index.query(text)
        seconds.append({**answer.seconds, "total": time.perf_counter() - started})
        ids.append([hit.id for hit in answer])
    expected = index.query_exhaustively(texts)
    hits = [np.isin([hit.id for hit in top], fast) for top, fast in zip(expected, ids, strict=True)]
    top_1, top_10 = np.mean([row[0] for row in hits]), np.mean(hits)
    times = 1000 * np.percentile([list(row.values()) for row in seconds], (50, 95), axis=0)
    pairs = zip(seconds[0], times.T.round(2).tolist(), strict=True)
    milliseconds = {stage: {"p50": p50, "p95": p95} for stage, (p50, p95) in pairs}
    sizes = {"sentences": len(texts), "segments": len(index)}
    sizes |= {"candidates": index.candidates, "rerank": index.rerank}
    recall = {"top_1": round(100 * float(top_1), 2), "top_10": round(100 * float(top_10), 2)}
    return {**sizes, **recall, "milliseconds": milliseconds}
