"""Deletes rows that several processes have added to a table."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


def delete_repeated_rows(table: Any, names: Sequence[str] = ("id",)) -> None:
    """Commits a version in which no two rows have the same values in the columns `names`."""
    table.checkout_latest()
    if not len(repeated := repeated_rows(table, names)):
        return
    version, before = table.version, _rows_by_key(table, names, repeated.to_pylist())
    table.delete(f"_rowid IN ({', '.join(map(str, repeated.to_pylist()))})")
    # Another process may have deleted the other copies at the same time: rows change their order
    # when files are merged.
    table.checkout_latest()
    if lost := before.keys() - set(read_keys_of(table, names)[0].tolist()):
        table.checkout(version)
        numbers = ", ".join(str(before[key]) for key in lost)
        rows = table.search().where(f"_rowid IN ({numbers})").to_arrow()
        table.checkout_latest()
        table.merge_insert(list(names)).when_not_matched_insert_all().execute(rows)


def read_keys_of(table: Any, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of some columns as one string for each row, and the ids of the rows."""
    rows = table.search().select(list(names)).with_row_id(True).to_arrow().sort_by("_rowid")
    columns = [rows[name].to_numpy(zero_copy_only=False) for name in names]
    keys = functools.reduce(lambda a, b: a + "|" + b, columns)
    return keys, rows["_rowid"].to_numpy()


def repeated_rows(table: Any, names: Sequence[str] = ("id",)) -> pa.Array:
    """Returns the ids of rows that repeat a segment: two processes may add the same file.

    A folder is locked for one writer, which a bucket cannot be. `names` are the columns by which
    rows are told apart.
    """
    keys, rows = read_keys_of(table, names)
    _, first = np.unique(keys, return_index=True)
    return pa.array(np.delete(rows, first))


def _rows_by_key(table: Any, names: Sequence[str], among: Sequence[int]) -> dict[str, int]:
    """Returns {key: row id} of some rows."""
    keys, rows = read_keys_of(table, names)
    chosen = np.isin(rows, among)
    return dict(zip(keys[chosen].tolist(), rows[chosen].tolist(), strict=True))
