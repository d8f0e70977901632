"""Caches rows of fixed width in files on the local disk."""

import contextlib
import itertools
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt32, UInt64

FILE_BYTES = 2**23  # of a full file
_OFFSET_BITS = 32  # of a row id, the rest is the fragment
_HEADER = [("key", np.uint64), ("digest", np.uint32)]
RowIds = UInt64[np.ndarray, " n"]


class RowCache:
    """Rows of an index in sparse files, each with consecutive rows of one fragment.

    Several threads and processes may use a cache at once. Each record has the key of its row and a
    checksum, so one that was never written, was written in part or is corrupted counts as missing.

    Args:
        folder: the folder of the caches of all indexes, which is created when first needed.
        name: subfolder of this index.
        content: dtype of a row.
        limit: maximum size of `folder` in bytes, and never more than half of the space on its disk
            that is free or used by it. Files that were not used for longest are removed first.
    """

    def __init__(self, folder: Path, name: str, content: np.dtype, *, limit: int) -> None:
        self.limit = limit
        self.is_usable = limit > 0  # False after an error of the disk
        self._folder, self._name = folder, name
        self._dtype = np.dtype([*_HEADER, ("content", content)])
        self._rows_per_file = max(1, FILE_BYTES // self._dtype.itemsize)
        self._unchecked = limit  # bytes written since files were last removed; unknown at first

    @property
    def max_rows(self) -> int:
        """Number of rows that fit, with some room for the file system's blocks."""
        return self.limit * 9 // 10 // self._dtype.itemsize

    def load(self, row_ids: RowIds, keys: RowIds) -> tuple[np.ndarray, Bool[np.ndarray, " n"]]:
        """Returns (rows, mask of those that are in the cache). `row_ids` must be sorted."""
        records = np.zeros(len(row_ids), self._dtype)
        buffers_nxB = _to_bytes(records)
        for path, first, stop, places in self._files(row_ids):
            with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
                for row, place in zip(range(first, stop), places, strict=True):
                    os.preadv(file.fileno(), [buffers_nxB[row]], place)
                os.utime(path)
        digests = records["digest"] == _compute_digests(buffers_nxB)
        return records["content"], digests & (records["key"] == keys)

    def has(self, row_ids: RowIds, keys: RowIds) -> Bool[np.ndarray, " n"]:
        """Returns the mask of the rows in the cache without reading them."""
        stored = [b""] * len(row_ids)
        for path, first, stop, places in self._files(row_ids):
            with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
                for row, place in zip(range(first, stop), places, strict=True):
                    stored[row] = os.pread(file.fileno(), keys.itemsize, place)
        return np.array([one == key.tobytes() for one, key in zip(stored, keys, strict=True)], bool)

    def store(self, row_ids: RowIds, keys: RowIds, content: np.ndarray) -> None:
        """Adds rows, or logs a warning if the disk cannot be written. `row_ids` must be sorted."""
        if not self.is_usable:
            return
        records = np.zeros(len(row_ids), self._dtype)
        records["key"], records["content"] = keys, content
        buffers_nxB = _to_bytes(records)
        records["digest"] = _compute_digests(buffers_nxB)
        try:
            folder = self._folder / self._name
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path, first, stop, places in self._files(row_ids):
                _write(path, buffers_nxB[first:stop], places)
            self._unchecked += buffers_nxB.size
            if self._unchecked > self.limit // 64:  # listing all files takes time
                self._remove_oldest()
                self._unchecked = 0
        except OSError as error:
            self.is_usable = False
            logging.warning("%s cannot be written: %s; set XCLIP_JAX_CACHE", self._folder, error)

    def _files(self, row_ids: RowIds) -> Iterator[tuple[Path, int, int, list[int]]]:
        """Yields (file, first row, last row + 1, positions of the rows in the file in bytes)."""
        fragments, offsets = row_ids >> _OFFSET_BITS, row_ids & (2**_OFFSET_BITS - 1)
        numbers, places = np.divmod(offsets, self._rows_per_file)
        places = (places * self._dtype.itemsize).tolist()
        changes = (np.diff(fragments) != 0) | (np.diff(numbers) != 0)
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(row_ids)]
        for first, stop in itertools.pairwise(bounds):
            if first < stop:
                name = f"{fragments[first]}-{numbers[first]}"
                yield self._folder / self._name / name, first, stop, places[first:stop]

    def _remove_oldest(self) -> None:
        files = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_blocks * 512, path))
        used = sum(size for _, size, _ in files)
        limit = min(self.limit, (used + shutil.disk_usage(self._folder).free) // 2)
        for _, size, path in sorted(files):
            if used <= limit:
                break
            path.unlink(missing_ok=True)
            used -= size


def _write(path: Path, buffers_nxB: np.ndarray, places: list[int]) -> None:
    """Writes records to their positions in a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        width = buffers_nxB.shape[1]
        starts = [0, *(np.flatnonzero(np.diff(places) != width) + 1).tolist(), len(places)]
        for first, stop in itertools.pairwise(starts):
            os.pwrite(file, buffers_nxB[first:stop].data, places[first])
    finally:
        os.close(file)


def _to_bytes(records: np.ndarray) -> np.ndarray:
    """Returns a view of records as bytes, one row each."""
    return records.view(np.uint8).reshape(len(records), records.dtype.itemsize)


def _compute_digests(buffers_nxB: np.ndarray) -> UInt32[np.ndarray, " n"]:
    """Returns the CRC-32 of each record without its own checksum."""
    start = np.dtype(_HEADER).itemsize
    digests = [zlib.crc32(one[start:], zlib.crc32(one[:8])) for one in buffers_nxB]
    return np.array(digests, np.uint32)
