"""Export of the embeddings of an index for other programs."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from xclip_jax.cli import InputError, progress
from xclip_jax.search.index import Index


def export_segments(index: Index, path: str | os.PathLike) -> None:
    """Writes a .parquet or .npz file with one row per segment.

    Columns: id, path, size (bytes), mtime (ns), start, end (seconds), count, times (F seconds),
    video (D) and frames (F x D numbers, in the .npz an N x F x D array); only the first `count`
    times and frames are real. Parquet is written in blocks, an .npz is assembled in memory.

    Raises:
        InputError: another suffix, or the index is empty.
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".npz"):
        raise InputError(f"--output={path}: must end in .parquet or .npz")
    if not len(index):
        raise InputError(f"{index.location} is empty")
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
