"""Prints search results as a table, JSON or picture, and exports embeddings."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from xclip_jax.cli import InputError, progress
from xclip_jax.data.video import VideoError, read_still
from xclip_jax.report.canvas import BLUE, INK, MUTED, Canvas, drawing_style
from xclip_jax.search.funnel import Answer, Hit
from xclip_jax.search.index import Index

GRID_COLUMNS, CELL_WIDTH, CELL_HEIGHT, MARGIN = (
    4,
    240,
    150,
    18,
)  # pixels of a picture, and around it
_PLAYERS = {  # players that can start at a given second
    "mpv": ["--start={second}", "{path}"],
    "vlc": ["--start-time={second}", "{path}"],
    "ffplay": ["-loglevel", "error", "-ss", "{second}", "{path}"],
}


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    print(json.dumps(value, ensure_ascii=False, indent=1))


def print_answer(answer: Answer, *, as_json: bool) -> None:
    """Prints the results of a search as a table or as JSON."""
    if as_json:
        print_json(dataclasses.asdict(answer))
        return
    if answer.note:
        print(f"note: {answer.note}", file=sys.stderr)
    if not answer.hits:
        print(f"no results: {answer.searched:,} segments pass the filters")
        return
    print(f"{'rank':>4}  {'score':>7}  {'best':>7}  {'segment':>15}  file")
    for hit in answer:
        span = f"{format_time(hit.start)}-{format_time(hit.end)}"
        best, path = format_time(hit.second), shorten_path(hit.path)
        print(f"{hit.rank:4}  {hit.score:7.2f}  {best:>7}  {span:>15}  {path}")
    milliseconds = 1000 * sum(answer.seconds.values())
    print(
        f"{answer.searched:,} segments searched in {milliseconds:,.0f} ms, including compilation",
        file=sys.stderr,
    )


def print_captions(ranked: Sequence[tuple[str, float]], *, as_json: bool) -> None:
    """Prints captions with their scores as a table or as JSON."""
    if as_json:
        print_json([{"caption": caption, "score": score} for caption, score in ranked])
        return
    print(f"{'rank':>4}  {'score':>7}  caption")
    for rank, (caption, score) in enumerate(ranked, 1):
        print(f"{rank:4}  {score:7.2f}  {caption}")


def format_time(seconds: float) -> str:
    """Returns seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def shorten_path(path: str) -> str:
    """Returns the path relative to the current folder if it is below it."""
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def play(hit: Hit) -> None:
    """Opens the file at its best second, or from the start if no suitable player is installed."""
    for player, options in _PLAYERS.items():
        if shutil.which(player):
            options = [option.format(second=hit.second, path=hit.path) for option in options]
            subprocess.Popen([player, *options])
            return
    webbrowser.open(Path(hit.path).as_uri())
    time = format_time(hit.second)
    print(f"mpv, VLC or ffplay is not installed: the best second is {time}", file=sys.stderr)


@drawing_style()
def draw_grid(
    path: str | Path, title: str, hits: Sequence[Hit], *, thumbnail: Callable[[str], bytes]
) -> None:
    """Writes a picture with the frame at the best second of each hit.

    Args:
        path: the .png file.
        title: the query.
        hits: at least one.
        thumbnail: function from segment id to JPEG, for files that can no longer be read.
    """
    columns = min(GRID_COLUMNS, len(hits))
    rows = -(-len(hits) // columns)
    width = max(2, columns) * (CELL_WIDTH + MARGIN) + MARGIN
    canvas = Canvas(width, 70 + rows * (CELL_HEIGHT + 62))
    canvas.paragraph(MARGIN, 36, title, width - 2 * MARGIN, 2, size=17, weight="bold")
    for index, hit in enumerate(hits):
        x = MARGIN + index % columns * (CELL_WIDTH + MARGIN)
        y = 70 + index // columns * (CELL_HEIGHT + 62)
        _draw_hit(canvas, x, y, hit, _read_picture(hit, thumbnail))
    canvas.figure.savefig(path)


def _draw_hit(
    canvas: Canvas, x: float, y: float, hit: Hit, pixels: UInt8[np.ndarray, "H W 3"]
) -> None:
    scale = min(CELL_WIDTH / pixels.shape[1], CELL_HEIGHT / pixels.shape[0])
    width, height = pixels.shape[1] * scale, pixels.shape[0] * scale
    canvas.box(x, y, CELL_WIDTH, CELL_HEIGHT, 4, facecolor="#11151d", edgecolor="#11151d")
    left, top = x + (CELL_WIDTH - width) / 2, y + (CELL_HEIGHT - height) / 2
    canvas.image(pixels, left, top, width, height)
    baseline = y + CELL_HEIGHT + 15
    canvas.text(x, baseline, f"{hit.rank}", 13, BLUE, weight="bold")
    canvas.text(x + CELL_WIDTH, baseline, f"{hit.score:.2f}", 13, INK, ha="right")
    canvas.text(x + 26, baseline, format_time(hit.second), 13, INK, weight="bold")
    name = os.path.basename(hit.path)
    canvas.paragraph(x, y + CELL_HEIGHT + 34, name, CELL_WIDTH, size=11, color=MUTED)


def _read_picture(hit: Hit, thumbnail: Callable[[str], bytes]) -> UInt8[np.ndarray, "H W 3"]:
    try:
        jpeg = read_still(hit.path, hit.second)
    except (VideoError, OSError):
        jpeg = thumbnail(hit.id)
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def export_segments(index: Index, path: str | os.PathLike) -> None:
    """Writes a .parquet or .npz file with one row per segment.

    Columns: id, path, size (bytes), mtime (ns), start, end (seconds), count, times (F seconds),
    video (D) and frames (F x D numbers, in the .npz an N x F x D array); only the first `count`
    times and frames are real. Parquet is written in blocks, an .npz is built in memory.

    Raises:
        InputError: the suffix is another, or the index is empty.
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".npz"):
        raise InputError(f"--output={path}: must end in .parquet or .npz")
    if not len(index):
        raise InputError(f"the index {index.location} is empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    write = _write_parquet if path.suffix == ".parquet" else _write_npz
    with progress(len(index), "writing", "segment") as bar:
        write(index.tables(), partial, bar)
    os.replace(partial, path)


def _write_parquet(tables: Iterator[pa.Table], path: Path, bar: tqdm) -> None:
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)
            bar.update(len(table))


def _write_npz(tables: Iterator[pa.Table], path: Path, bar: tqdm) -> None:
    blocks = []
    for table in tables:
        blocks.append(table)
        bar.update(len(table))
    table = pa.concat_tables(blocks).combine_chunks()
    arrays: dict[str, Any] = {
        name: _to_array(table[name].combine_chunks()) for name in table.column_names
    }
    dim = arrays["video"].shape[1]
    arrays["frames"] = arrays["frames"].reshape(len(table), -1, dim)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _to_array(column: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type):
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=np.str_)
    return column.to_numpy(zero_copy_only=False)
