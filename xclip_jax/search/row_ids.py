"""Ids of rows and of segments as numbers, and the parts that an index's rows are in."""

import dataclasses
import re
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int, UInt64

from xclip_jax.search.vectors import RowMask, Rows

_SHARED_ROWS = 4096  # consecutive rows of a fragment that are in one part
_FRAGMENT_BITS = 32  # LanceDB's row id: the number of a fragment, then 32 bits of a row in it
_DIGITS = 16  # of an id
_ID = re.compile(f"[0-9a-f]{{{_DIGITS}}}")
_VALUES = np.full(256, 255, np.uint8)  # of hexadecimal digits, by their bytes
_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(_DIGITS)
Keys = UInt64[np.ndarray, " n"]
RowIds = Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One of `count` parts of an index's rows."""

    number: int = 0
    count: int = 1

    def holds(self, row_ids: RowIds) -> RowMask:
        """Returns the mask of the rows that are in this part."""
        return find_parts(row_ids, self.count) == self.number


WHOLE = Part()


def find_parts(row_ids: RowIds, count: int) -> Rows:
    """Returns the number, of `count`, of the part that holds each row."""
    fragments, places = row_ids >> _FRAGMENT_BITS, row_ids & ((1 << _FRAGMENT_BITS) - 1)
    return (fragments + places // _SHARED_ROWS) % count


@dataclasses.dataclass(frozen=True)
class RowKeys:
    """The segments of a table by row id, without those that repeat an earlier one.

    `contents` differ between rows of other content (zeros in an index of an earlier version).
    """

    keys: Keys  # ids of the segments as numbers
    row_ids: RowIds
    contents: Keys

    def only(self, mask: RowMask) -> "RowKeys":
        """Returns the segments of a mask."""
        return RowKeys(self.keys[mask], self.row_ids[mask], self.contents[mask])


def read_keys(table: Any) -> RowKeys:
    """Reads the keys of all segments of a table.

    Two processes may add the same file, as a bucket cannot be locked for one of them.
    """
    names = [name for name in ("digest", "frames_digest") if name in table.schema.names]
    rows = table.search().select(["id", *names]).with_row_id(True).to_arrow()
    keys, row_ids = to_keys(rows["id"]), rows["_rowid"].to_numpy().astype(np.int64)
    contents = to_contents(rows)
    order = np.argsort(row_ids, kind="stable")
    first = np.sort(np.unique(keys[order], return_index=True)[1])
    order = order[first]
    return RowKeys(keys[order], row_ids[order], contents[order])


def to_contents(rows: Any) -> Keys:
    """Returns numbers made of the two checksums of rows, zeros if they have none."""
    contents = np.zeros(len(rows), np.uint64)
    for name, shift in (("digest", 0), ("frames_digest", 32)):
        if name in rows.schema.names:
            digests = rows[name].to_numpy().astype(np.uint64)
            contents ^= digests << np.uint64(shift)
    return contents


def to_keys(ids: Any) -> Keys:
    """Converts an Arrow column of ids, 16 hexadecimal digits, to numbers."""
    texts = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    count, (_, offsets, data) = len(texts), texts.buffers()
    if count and data is not None:
        starts = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + count + 1]
        if (np.diff(starts) == _DIGITS).all():
            text = np.frombuffer(data, np.uint8)[starts[0] : starts[-1]]
            digits = _VALUES[text.reshape(count, _DIGITS)]
            if (digits < _DIGITS).all():
                pairs = digits[:, ::2] << 4 | digits[:, 1::2]
                return pairs.view(">u8")[:, 0].astype(np.uint64)
    return np.array([_to_key(text) for text in texts.to_pylist()], np.uint64)


def _to_key(text: str) -> int:
    """Returns an id as a number. For a corrupted one it is any: its checksum will show that."""
    return int(text, 16) if is_id(text) else hash(text) % 2**64


def is_id(text: str) -> bool:
    """Returns True if a text has the form of a segment's id."""
    return _ID.fullmatch(text) is not None


def find_places(sorted_values: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the row of each wanted value, -1 if there is none."""
    if not len(rows):
        return np.full(len(wanted), -1)
    order = np.argsort(wanted)  # three times as fast: the search goes through memory once
    places = np.empty(len(wanted), np.int64)
    places[order] = np.searchsorted(sorted_values, wanted[order])
    places = np.minimum(places, len(rows) - 1)
    return np.where(sorted_values[places] == wanted, rows[places], -1)


def to_matrix(column: Any, width: int) -> np.ndarray:
    """Converts an Arrow column of fixed-size lists to an array of `width` columns."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
