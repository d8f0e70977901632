"""Reads frame features of an index: from a folder directly, from a bucket through a cache.

A request to a bucket takes as long as reading some megabytes. So rows that are near each other,
which means less than REQUEST_BYTES apart, are read together with all rows between them, unless
these ranges total more than MAX_RANGE_BYTES: then each row is read by itself. 200 rows are a few
large ranges in an index of up to 250 MB, and about 200 requests in a larger one. All rows that were
read stay in a cache on the local disk, and are read from there without a request.
"""

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Integer, UInt64

from xclip_jax.convert.cache import cache_folder
from xclip_jax.search.digests import compute_digests
from xclip_jax.search.row_cache import RowCache

DIGEST = "frames_digest"
CACHE_BYTES = 2**34  # maximum size of the cache on disk
REQUEST_BYTES = 6 * 2**20  # what a request costs: a latency of 60 ms at 100 MB/s
MAX_RANGE_BYTES = 2**28  # of a query: some seconds
_PREFETCH_BYTES = 2**27  # read at once
_FRAGMENT_SHIFT = 32  # of a row id
_KEY_SHIFT = np.uint64(32)  # of a CRC-32 in a key
RowIds = UInt64[np.ndarray, " n"]
Places = Int[np.ndarray, " n"]  # rows of a FrameReader, in the order of their row ids


class FrameReader:
    """Reader of some columns of one version of a table, in any order of its rows.

    It is thread-safe. Rows are cached by fragment and offset, which are the two halves of a row id,
    together with their keys. Segments with the same id in indexes with the same settings have the
    same features, so an index that replaces another one at the same URI is not mixed up with it.

    Args:
        location: absolute path of the index's folder, or a URI (s3://, gs://, az://).
        table: the LanceDB table of the segments.
        columns: numbers or fixed-size lists of numbers, such as `frames` and `weights`.
        row_ids: the row ids of all N segments.
        keys: the ids of all N segments as numbers.
        digests: the checksums of all N segments' `columns` (see PARTS), which `read` returns. Rows
            that differ from them are not cached. None: unknown.
        folder: folder of the cache; None: a subfolder of $XCLIP_JAX_CACHE or ~/.cache/xclip_jax.
        cache_bytes: maximum size of the cache.
    """

    def __init__(
        self,
        location: str,
        table: Any,
        columns: Sequence[str],
        *,
        row_ids: UInt64[np.ndarray, " N"],
        keys: UInt64[np.ndarray, " N"],
        digests: Integer[np.ndarray, " N"] | None = None,
        folder: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._table, self._columns = table, list(columns)
        if (np.diff(row_ids.astype(np.int64)) < 0).any():
            order = np.argsort(row_ids)
            row_ids, keys = row_ids[order], keys[order]
            digests = None if digests is None else digests[order]
        if digests is not None:  # rows of the same id and other content are told apart
            keys = keys ^ (digests.astype(np.uint64) << _KEY_SHIFT)
        self._row_ids, self._keys, self._digests = row_ids, keys, digests
        schema = table.schema
        self._schema = pa.schema([schema.field(name) for name in self._columns])
        self._dtype = np.dtype([(field.name, *_numpy_type(field.type)) for field in self._schema])
        self._cache: RowCache | None = None
        if "://" in location:
            facts = repr((location, schema.metadata, self._dtype.descr)).encode()
            name = hashlib.blake2b(facts, digest_size=8).hexdigest()
            folder = folder or cache_folder() / "frames"
            self._cache = RowCache(folder, name, self._dtype, limit=cache_bytes)
        self._lock = threading.Lock()  # of large ranges: others then find them in the cache

    def read(self, row_ids: Sequence[int] | RowIds) -> pa.Table:
        """Returns the columns of the given rows, in that order, and `frames_digest` if known.

        Raises LookupError for a row that does not exist, and errors of LanceDB.
        """
        wanted, place_of_row = np.unique(self._locate(row_ids), return_inverse=True)
        table = self._read_cached(wanted) if self._cache else self._read_directly(wanted)
        if self._digests is not None:
            table = table.append_column(DIGEST, pa.array(self._digests[wanted]))
        return table.take(pa.array(place_of_row))

    def prefetch(self, stopped: threading.Event | None = None) -> int:
        """Reads all rows of a bucket into the cache, as far as they fit, in large ranges.

        Returns the number of rows that were read. `stopped` ends it between two ranges.
        """
        if self._cache is None:
            return 0
        count, num_read = min(len(self._row_ids), self._cache.max_rows), 0
        step = max(1, _PREFETCH_BYTES // self._dtype.itemsize)
        for first in range(0, count, step):
            if not self._cache.is_usable or (stopped is not None and stopped.is_set()):
                break
            places = np.arange(first, min(first + step, count))
            missing = places[~self._cache.has(self._row_ids[places], self._keys[places])]
            num_read += sum(len(part) for part, _ in self._fetch(self._merge(missing)))
        return num_read

    def _locate(self, row_ids: Sequence[int] | RowIds) -> Places:
        wanted = np.asarray(row_ids, np.uint64)
        places = np.searchsorted(self._row_ids, wanted)
        inside = np.minimum(places, len(self._row_ids) - 1)
        unknown = wanted if not len(self._row_ids) else wanted[self._row_ids[inside] != wanted]
        if len(unknown):
            raise LookupError(f"there is no row {unknown[0]}")
        return places

    def _read_directly(self, places: Places) -> pa.Table:
        parts = list(self._take(places))
        table = pa.concat_tables([self._schema.empty_table(), *(table for _, table in parts)])
        if len(parts) > 1:
            table = table.take(pa.array(np.argsort(np.concatenate([rows for rows, _ in parts]))))
        return table

    def _read_cached(self, places: Places) -> pa.Table:
        content, missing = self._load(places)
        is_large = len(self._merge(missing)) * self._dtype.itemsize > REQUEST_BYTES
        # Another query may be reading the same ranges. One that needs little does not wait for it.
        with self._lock if is_large else contextlib.nullcontext():
            content, missing = self._load(places) if is_large else (content, missing)
            for part, rows in self._fetch(self._merge(missing)):
                _, ours, theirs = np.intersect1d(places, part, return_indices=True)
                content[ours] = rows[theirs]
        return self._to_table(content)

    def _load(self, places: Places) -> tuple[np.ndarray, Int[np.ndarray, " m"]]:
        """Returns (content of rows, those of the rows that the cache does not have)."""
        cache: Any = self._cache
        content, is_present = cache.load(self._row_ids[places], self._keys[places])
        return content, places[~is_present]

    def _merge(self, places: Places) -> Int[np.ndarray, " m"]:
        """Returns sorted rows and, where this is cheaper, those between two of them."""
        if len(places) < 2 or not (self._cache and self._cache.is_usable):
            return places
        row_ids = self._row_ids[places].astype(np.int64)
        is_near = np.diff(row_ids) * self._dtype.itemsize <= REQUEST_BYTES
        is_near &= np.diff(row_ids >> _FRAGMENT_SHIFT) == 0
        starts = places[np.append(True, ~is_near)]
        stops = places[np.append(~is_near, True)] + 1
        if (stops - starts).sum() * self._dtype.itemsize > MAX_RANGE_BYTES:
            return places
        return np.concatenate([np.arange(*ends) for ends in zip(starts, stops, strict=True)])

    def _fetch(self, places: Places) -> Iterator[tuple[Places, np.ndarray]]:
        """Reads rows from the table into the cache, and yields (rows, their content)."""
        for part, table in self._take(places):
            content = np.zeros(len(part), self._dtype)
            for field in self._schema:
                content[field.name] = _to_numpy(table[field.name])
            is_intact = np.ones(len(part), bool)
            if self._digests is not None:
                is_intact = compute_digests(table, DIGEST) == self._digests[part]
            cache: Any = self._cache
            stored = part[is_intact]
            cache.store(self._row_ids[stored], self._keys[stored], content[is_intact])
            yield part, content

    def _take(self, places: Places) -> Iterator[tuple[Places, pa.Table]]:
        """Reads rows from the table, and yields (sorted rows, their columns)."""
        if not len(places):
            return
        num_rows = 0
        query = self._table.take_row_ids(self._row_ids[places].tolist()).select(self._columns)
        for batch in query.with_row_id().to_batches():
            found = np.searchsorted(self._row_ids, batch["_rowid"].to_numpy())
            table = pa.Table.from_batches([batch]).select(self._columns)
            num_rows += len(found)
            if (np.diff(found) < 0).any():  # LanceDB does not promise an order
                order = np.argsort(found)
                found, table = found[order], table.take(pa.array(order))
            yield found, table
        if num_rows < len(places):
            raise LookupError(f"{len(places) - num_rows} rows no longer exist")

    def _to_table(self, content: np.ndarray) -> pa.Table:
        columns = []
        for field in self._schema:
            values = np.ascontiguousarray(content[field.name]).reshape(-1)
            if pa.types.is_fixed_size_list(field.type):
                columns.append(pa.FixedSizeListArray.from_arrays(values, type=field.type))
            else:
                columns.append(pa.array(values, field.type))
        return pa.Table.from_arrays(columns, schema=self._schema)


def _numpy_type(kind: pa.DataType) -> tuple[Any, tuple[int, ...]]:
    """Returns (type of a number, shape) of a column's values."""
    if pa.types.is_fixed_size_list(kind):
        return kind.value_type.to_pandas_dtype(), (kind.list_size,)
    return kind.to_pandas_dtype(), ()


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        values = array.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(array), array.type.list_size)
    return array.to_numpy(zero_copy_only=False)
