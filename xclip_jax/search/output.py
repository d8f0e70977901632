"""Outputs of the command line: results as text or picture, embeddings, measured recall."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
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
from xclip_jax.search.index import Index
from xclip_jax.search.querying import WordQuery
from xclip_jax.search.results import Answer, Hit, format_time

GRID_COLUMNS, CELL_SIZE, MARGIN = 4, (240, 150), 18  # of a picture, in pixels
_PLAYERS = {  # players that can start at a given second
    "mpv": ["--start={second}", "{path}"],
    "vlc": ["--start-time={second}", "{path}"],
    "ffplay": ["-loglevel", "error", "-ss", "{second}", "{path}"],
}


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    print(json.dumps(value, ensure_ascii=False, indent=1))


def print_answer(answer: Answer) -> None:
    """Prints the results of a search as a table."""
    if answer.note:
        print(f"note: {answer.note}", file=sys.stderr)
    if not answer.hits:
        print(f"no results in {count(answer.searched, 'segment')}")
        return
    has_bias = any(hit.bias for hit in answer)  # results are ranked by score - bias
    bias = f"  {'bias':>7}" * has_bias
    print(f"{'rank':>4}  {'score':>7}{bias}  {'best':>7}  {'moment':>15}  file")
    for hit in answer:
        best, start, end = map(format_time, (hit.second, hit.start, hit.end))
        score, bias = format_number(hit.score), f"  {hit.bias:7.2f}" * has_bias
        notes = "  (weak match)" * hit.weak
        if hit.duplicates:
            notes += f"  (+{count(len(hit.duplicates), 'near-duplicate')})"
        path = shorten_path(hit.path)
        print(f"{hit.rank:4}  {score}{bias}  {best:>7}  {f'{start}-{end}':>15}  {path}{notes}")
        for match in hit.matches:
            if match.text:
                where = "said" if match.source == "speech" else "written"
                quote = textwrap.shorten(match.text, 60, placeholder=" ...")
                print(f"{'':4}  {where} at {format_time(match.start)}: {quote}")
    milliseconds = 1000 * sum(answer.seconds.values())
    compilation = ", including compilation" * any(hit.score is not None for hit in answer)
    searched = f"{count(answer.searched, 'segment')} searched in {milliseconds:,.0f} ms"
    print(f"{searched}{compilation}", file=sys.stderr)


def count(number: int, noun: str) -> str:
    """Returns a number with its noun, as in "1 file" and "1,000 files"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def format_number(score: float | None) -> str:
    """Returns a score in seven characters, "-" if pictures were not searched."""
    return f"{'-':>7}" if score is None else f"{score:7.2f}"


def shorten_path(path: str) -> str:
    """Returns the path relative to the current folder if it is below it, safe to print."""
    path = os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)


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
        if hit.score is not None:
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


def measure_recall(index: Index, texts: Sequence[str]) -> dict[str, Any]:
    """Runs each text through the funnel and the exhaustive search of a non-empty index.

    Returns the numbers of sentences, segments, candidates and rerank; `top_1` and `top_10`:
    percentages of the first and of the first ten exhaustive results that are in the funnel's first
    ten; `milliseconds`: {stage: {"p50", "p95"}}, including `total`.
    """
    if not len(index):
        raise InputError(f"the index {index.location} is empty")
    texts = [WordQuery.parse(text).sentence for text in texts]  # without quoted words
    index.query(texts[0], sources=["picture"])  # compiles
    ids, seconds = [], []
    for text in texts:
        started = time.perf_counter()
        answer = index.query(text, sources=["picture"], merge=False)
        seconds.append({**answer.seconds, "total": time.perf_counter() - started})
        ids.append([hit.id for hit in answer])
    expected = index.query_exhaustively(texts, merge=False)
    hits = [np.isin([hit.id for hit in top], fast) for top, fast in zip(expected, ids, strict=True)]
    top_1, top_10 = np.mean([row[0] for row in hits]), np.mean(hits)
    times = 1000 * np.percentile([list(row.values()) for row in seconds], (50, 95), axis=0)
    pairs = zip(seconds[0], times.T.round(2).tolist(), strict=True)
    milliseconds = {stage: {"p50": p50, "p95": p95} for stage, (p50, p95) in pairs}
    sizes = {"sentences": len(texts), "segments": len(index)}
    sizes |= {"candidates": index.candidates, "rerank": index.rerank}
    recall = {"top_1": round(100 * float(top_1), 2), "top_10": round(100 * float(top_10), 2)}
    return {**sizes, **recall, "milliseconds": milliseconds}
