"""Embeddings of an index as a file for other programs."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xclip_jax.cli import InputError


def write(index, path, bar):
    """Writes a row a segment: id, path, size, mtime, start, end, count, times, video, frames.

    `video` is D numbers, `frames` F x D, of which the first `count` frames are real, at `times`.
    A .parquet file is written block by block; an .npz file (arrays N, N x D, N x F x D) is made in
    memory.

    Args:
        index: an Index.
        path: ends in .parquet or .npz.
        bar: progress bar, moved on by the segments done.

    Raises:
        InputError: another ending, or nothing to write.
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".npz"):
        raise InputError(f"--output={path}: must end in .parquet or .npz")
    if not len(index):
        raise InputError(f"{index.location} is empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    write_file = _write_parquet if path.suffix == ".parquet" else _write_npz
    write_file(index.tables(), partial, bar)
    os.replace(partial, path)


def _write_parquet(tables, path, bar):
    writer = None
    for table in tables:
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
        bar.update(len(table))
    writer.close()


def _write_npz(tables, path, bar):
    parts = []
    for table in tables:
        parts.append(table)
        bar.update(len(table))
    table = pa.concat_tables(parts).combine_chunks()
    arrays = {name: _array(table[name].combine_chunks()) for name in table.column_names}
    dim = arrays["video"].shape[1]
    arrays["frames"] = arrays["frames"].reshape(len(table), -1, dim)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _array(column):
    if pa.types.is_fixed_size_list(column.type):
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=np.str_)
    return column.to_numpy(zero_copy_only=False)
