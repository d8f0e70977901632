"""Checksums of the rows of an index, by which corrupted ones are noticed.

Each is a CRC-32 of a part of a row, so that no part has to be read for the sake of another.
"""

import contextlib
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64

from xclip_jax.cli import PathLike, explain_no_file

PARTS = {
    "digest": [
        *("id", "path", "size", "mtime", "sample"),
        *("start", "end", "offset", "count", "times", "video", "bias"),
    ],
    "frames_digest": ["frames", "weights"],
    "thumbnail_digest": ["thumbnail"],
}
_SAMPLE_BYTES = 2**16
Rows = Any  # pa.Table or pa.RecordBatch


def sample_file(path: PathLike) -> int:
    """Returns the CRC-32 of the first and the last 64 KiB, or raises OSError.

    A file that was replaced by a link to another one may have been given its size and time.
    """
    with open(path, "rb") as file:
        digest = zlib.crc32(file.read(_SAMPLE_BYTES))
        file.seek(max(0, os.fstat(file.fileno()).st_size - _SAMPLE_BYTES))
        return zlib.crc32(file.read(_SAMPLE_BYTES), digest)


def check_unchanged(row: Mapping[str, Any]) -> None:
    """Raises OSError unless a file can be read and is the one that was indexed.

    `row` has its path, size, mtime (ns) and, if the index has it, sample.
    """
    path, name = row["path"], os.path.basename(row["path"])
    if problem := explain_no_file(path):
        raise OSError(f"{name} {problem}")
    try:
        status, sample = os.stat(path), sample_file(path)
    except FileNotFoundError:
        raise OSError(f"{name} is no longer on disk") from None
    except OSError as error:
        raise OSError(f"{name} cannot be read: {error.strerror}") from None
    found = status.st_size, status.st_mtime_ns, sample
    if found != (row["size"], row["mtime"], row.get("sample", sample)):
        raise OSError(f"{name} has changed since it was indexed: index it again")


def describe_files(paths: Iterable[PathLike]) -> str:
    """Returns a text that changes with the names, sizes and times of files, "" without a file."""
    described = []
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            described.append(f"{os.path.basename(path)} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(described)


def compute_digests(rows: Rows, part: str) -> Int64[np.ndarray, " n"]:
    """Returns the checksum of a part (a key of PARTS) of n rows."""
    digests = [0] * len(rows)
    for name in (name for name in PARTS[part] if name in rows.schema.names):  # two are optional
        for row, value in enumerate(_to_bytes(rows[name])):
            digests[row] = zlib.crc32(value, digests[row])
    return np.array(digests, np.int64)


def add_digests(rows: pa.Table) -> pa.Table:
    """Returns a table with the checksums of its rows as further columns."""
    for part in PARTS:
        rows = rows.append_column(part, pa.array(compute_digests(rows, part)))
    return rows


def are_intact(rows: Rows, part: str) -> Bool[np.ndarray, " n"]:
    """Returns the mask of the rows whose part equals its checksum, or which have none."""
    if part not in rows.schema.names:  # of an earlier version
        return np.ones(len(rows), bool)
    return rows[part].to_numpy(zero_copy_only=False) == compute_digests(rows, part)


def _to_bytes(column: Any) -> Any:
    """Returns the bytes of each value of a column."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_fixed_size_list(column.type):
        values = column.flatten().to_numpy(zero_copy_only=False)
        return np.ascontiguousarray(values).reshape(len(column), column.type.list_size)
    if pa.types.is_string(column.type):
        return (value.encode() for value in column.to_pylist())
    if pa.types.is_binary(column.type):
        return column.to_pylist()
    return np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).reshape(-1, 1)
