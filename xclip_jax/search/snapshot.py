"""Reads one version of an index: vectors and names in memory, frames on demand."""

import contextlib
import dataclasses
import functools
import logging
import textwrap
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypedDict

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from xclip_jax.cli import InputError, list_some
from xclip_jax.search.digests import PARTS, are_intact
from xclip_jax.search.moments import Moment
from xclip_jax.search.results import Hit
from xclip_jax.similarity import VideoFeatures

MAX_PATH = 4096  # characters of a path filter
_BATCH_ROWS = 4096
_BIAS_COLUMNS = 16  # of vectors in memory; two are used, but faiss is fast in multiples of 16
RowMask = Bool[np.ndarray, " N"]
Rows = Int[np.ndarray, " n"]


class Filters(TypedDict, total=False):
    """Conditions that restrict a search to some segments, where None means no restriction."""

    # Part of the path; with the wildcards `*` (any characters) and `?` (any one), a pattern of the
    # end of the path, or of the whole path if it begins with `/`.
    path: str | None
    # Seconds; the segment must overlap this interval of its file, and its best second is in it.
    start: float | None
    end: float | None


class Snapshot:
    """One version of an index: vectors, names and times in memory, frames read on demand.

    Of N segments: `ids`, `paths` (Arrow strings), `starts`, `ends` (seconds), `offsets` (seconds
    from the start of the file to its first frame), `times` (seconds of the frames, N x F),
    `vectors_NxD` (L2-normalised video vectors, float16), `biases` (hubness biases, subtracted from
    cosines with sentences; zeros in an index without a bank). Rows start at 0.
    """

    def __init__(self, location: str, about: Mapping[str, Any], table: Any) -> None:
        # A query is single-threaded in faiss; idle OpenMP threads would busy-wait after it and
        # slow down what follows (on two cores, reading rows by a third).
        faiss.omp_set_num_threads(1)
        self.version: int = table.version
        table.checkout(self.version)
        self._location, self._table = location, table
        self._max_frames, dim = about["max_frames"], about["embed_dim"]
        kinds = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        has_biases = "bias" in table.schema.names
        width = dim + _BIAS_COLUMNS * has_biases
        self._vector_index = faiss.IndexScalarQuantizer(width, *kinds)
        repeated = repeated_rows(table)
        self.corrupted: set[str] = set()  # paths of segments that are left out
        # Allocated once: growing by doubling would copy. The first `add` starts at row 0.
        codes = self._vector_index.codes
        codes.resize((table.count_rows() - len(repeated)) * self._vector_index.code_size)
        names = [*PARTS["digest"], "digest"]
        names = [name for name in names if name in table.schema.names]
        reader = table.search().select(names).with_row_id(True).to_batches(_BATCH_ROWS)
        batches = []
        for batch in reader:
            intact = are_intact(batch, "digest")
            self.corrupted.update(batch.filter(pa.array(~intact))["path"].to_pylist())
            first = ~np.isin(batch["_rowid"].to_numpy(), repeated)
            batch = batch.filter(pa.array(intact & first))
            vectors = unit_vectors(_to_matrix(batch["video"], dim))
            if has_biases:
                vectors = _append(vectors, batch["bias"].to_numpy())
            self._vector_index.add(vectors)
            batches.append(batch.drop_columns("video"))
        schema = reader.schema.remove(reader.schema.get_field_index("video"))
        rows = pa.Table.from_batches(batches, schema)
        self.ids, self.paths = rows["id"], rows["path"]
        self.starts, self.ends = rows["start"].to_numpy(), rows["end"].to_numpy()
        known = "offset" in rows.column_names
        self.offsets = rows["offset"].to_numpy() if known else np.zeros(len(rows))
        self.biases = rows["bias"].to_numpy() if has_biases else np.zeros(len(rows), np.float32)
        self.times = _to_matrix(rows["times"], self._max_frames).astype(np.float32)
        self._mtimes = rows["mtime"]
        self._counts, self._row_ids = rows["count"].to_numpy(), rows["_rowid"].to_numpy()
        if self.corrupted:
            paths = list_some(sorted(self.corrupted))
            logging.warning("segments are corrupted and left out: run index again for %s", paths)
        self.vectors_NxD = np.zeros((0, dim), np.float16)
        if len(rows):
            view = faiss.rev_swig_ptr(codes.data(), codes.size())
            self.vectors_NxD = view.view(np.float16).reshape(-1, width)[:, :dim]

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, segment_id: str) -> Rows:
        """Returns the row of a segment, or raises KeyError for an unknown id."""
        row = pc.index(self.ids, segment_id).as_py()
        if row < 0:
            raise KeyError(segment_id)
        return np.array([row])

    def rows_of(self, ids: Collection[str]) -> dict[str, int]:
        """Returns {id: row} of the segments that exist."""
        if not len(self):
            return {}
        keys, rows = self._rows_by_id
        wanted = np.array([int(one, 16) for one in ids], np.uint64)
        places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found = zip(ids, rows[places].tolist(), (keys[places] == wanted).tolist(), strict=True)
        return {one: row for one, row, exists in found if exists}

    @functools.cached_property
    def _rows_by_id(self) -> tuple[np.ndarray, Rows]:
        """The ids as sorted numbers, and their rows."""
        keys = np.array([int(one, 16) for one in self.ids.to_pylist()], np.uint64)
        rows = np.argsort(keys)
        return keys[rows], rows

    @functools.cached_property
    def films(self) -> pa.Table:
        """Table of the files: path, end_max (seconds), mtime_max (ns), id_first."""
        columns = {"path": self.paths, "end": self.ends, "mtime": self._mtimes, "id": self.ids}
        groups = pa.table(columns).group_by("path", use_threads=False)
        return groups.aggregate([("end", "max"), ("mtime", "max"), ("id", "first")])

    @functools.cached_property
    def _durations(self) -> dict[str, float]:
        return dict(zip(*(self.films[n].to_pylist() for n in ("path", "end_max")), strict=True))

    def hit(self, row: int, moment: Moment, **fields: Any) -> Hit:
        """Returns a moment of a segment as a Hit of rank 0, with further fields of it."""
        path = self.paths[row].as_py()
        return Hit(
            rank=0,
            id=self.ids[row].as_py(),
            path=path,
            **vars(moment),
            segment_start=float(self.starts[row]),
            segment_end=float(self.ends[row]),
            duration=self._durations[path],
            offset=float(self.offsets[row]),
            **fields,
        )

    def select(
        self, path: str | None = None, start: float | None = None, end: float | None = None
    ) -> "Selection":
        """Returns the rows that pass `Filters`."""
        mask = np.ones(len(self), bool)
        if path:
            path = unicodedata.normalize("NFC", path)
            pattern = path if any(c in path for c in "*?") else f"*{path}*"
            pattern = pattern if pattern.startswith("/") else f"*{pattern}"
            like = {"\\": r"\\", "%": r"\%", "_": r"\_", "*": "%", "?": "_"}
            options = pc.MatchSubstringOptions(pattern.translate(str.maketrans(like)))
            composed = pc.Utf8NormalizeOptions("NFC")
            paths = pc.call_function("utf8_normalize", [self.paths], composed)
            mask &= pc.call_function("match_like", [paths], options).to_numpy()
        if start is not None:
            mask &= self.ends > start
        if end is not None:
            mask &= self.starts <= end
        interval = -np.inf if start is None else start, np.inf if end is None else end
        return Selection(self, None if mask.all() else mask, interval)

    def nearest_rows(
        self, vector_1xD: np.ndarray, count: int, allowed: RowMask | None, *, subtract_bias: bool
    ) -> Rows:
        """Returns the allowed rows (None: all) of largest inner product, best first.

        `subtract_bias`: True to rank by the inner product minus the hubness bias.
        """
        options, dim = {}, vector_1xD.shape[1]
        query_1xE = np.zeros((1, self._vector_index.d), np.float32)
        query_1xE[:, :dim] = vector_1xD
        if subtract_bias:
            query_1xE[:, dim : dim + 2] = -1  # of `_append`; empty in an index without a bank
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            # faiss's type stubs describe the C++ constructors.
            selector = faiss.IDSelectorBitmap(bits)  # pyright: ignore[reportCallIssue]
            options["params"] = faiss.SearchParameters(sel=selector)  # pyright: ignore[reportCallIssue]
        _, rows = self._vector_index.search(query_1xE, min(count, len(self)), **options)
        return rows[0][rows[0] >= 0]

    def stamp(self, row: Rows) -> dict[str, Any]:
        """Reads path, size, mtime (ns) and, if the index has it, sample of a row's file."""
        names = {"path", "size", "mtime", "sample"} & set(self._table.schema.names)
        return self.read(row, sorted(names)).to_pylist()[0]

    def thumbnail(self, row: Rows) -> bytes:
        """Reads the JPEG thumbnail of a row."""
        return self.read(row, ["thumbnail"], "thumbnail_digest")["thumbnail"][0].as_py()

    def read(self, rows: Rows, columns: list[str], digest: str | None = None) -> pa.Table:
        """Reads columns of the given rows, in that order.

        `digest` is the checksum to compare with, if any: InputError is raised where it differs.
        """
        row_ids = self._row_ids[rows].tolist()
        names = [*columns, *({digest} & set(self._table.schema.names))]
        with readable(self._location):
            query = self._table.take_row_ids(row_ids).select(names)
            table = query.with_row_id().to_arrow()
            positions = {row_id: k for k, row_id in enumerate(table["_rowid"].to_pylist())}
            table = table.take([positions[row_id] for row_id in row_ids])
        if digest and not (intact := are_intact(table, digest)).all():
            path = self.paths[rows[intact.argmin()]].as_py()
            problem = f"the index {self._location} is corrupted at a segment of {path}"
            raise InputError(f"{problem}: touch that file and index it again")
        return table

    def features(self, rows: Rows) -> VideoFeatures:
        """Reads the VideoFeatures of the given rows, in the stored precision."""
        is_weighted = "weights" in self._table.schema.names
        names = ["video", "frames", *(["weights"] if is_weighted else [])]
        table = self.read(rows, names, "frames_digest")
        video = _to_matrix(table["video"], self.vectors_NxD.shape[1])
        frames = _to_matrix(table["frames"], self._max_frames * video.shape[1])
        weights = _to_matrix(table["weights"], self._max_frames) if is_weighted else None
        mask = np.arange(self._max_frames) < self._counts[rows, None]
        return VideoFeatures(video, frames.reshape(*mask.shape, -1), mask, weights)

    def tables(self) -> Iterator[pa.Table]:
        """Yields all columns except thumbnails and checksums as Arrow tables."""
        names = [n for n in self._table.schema.names if n not in ("thumbnail", "sample", *PARTS)]
        with readable(self._location):
            for batch in self._table.search().select(names).to_batches(_BATCH_ROWS):
                yield pa.Table.from_batches([batch])


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows of a snapshot that pass `Filters`."""

    snapshot: Snapshot
    rows: RowMask | None = None  # None: all
    interval: tuple[float, float] = (-np.inf, np.inf)  # seconds of a file

    def __len__(self) -> int:
        return len(self.snapshot) if self.rows is None else int(self.rows.sum())

    def rows_of(self, ids: Collection[str]) -> dict[str, int]:
        """Returns {id: row} of the segments that are selected."""
        rows = self.snapshot.rows_of(ids)
        return {one: row for one, row in rows.items() if self.rows is None or self.rows[row]}

    def only(self, rows: Rows) -> "Selection":
        """Returns the selected ones of these rows."""
        mask = np.zeros(len(self.snapshot), bool)
        mask[rows] = True
        return dataclasses.replace(self, rows=mask if self.rows is None else mask & self.rows)

    def without(self, rows: Rows) -> "Selection":
        """Returns the selected rows that are not one of these."""
        mask = np.ones(len(self.snapshot), bool) if self.rows is None else self.rows.copy()
        mask[rows] = False
        return dataclasses.replace(self, rows=mask)


def unit_vectors(vectors: Float[np.ndarray, "*rows D"]) -> Float[np.ndarray, "*rows D"]:
    """Returns float32 vectors L2-normalised along the last axis, where zeros stay zeros."""
    vectors = vectors.astype(np.float32, copy=False)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _append(vectors_nxD: np.ndarray, biases: np.ndarray) -> Float[np.ndarray, "n E"]:
    """Returns vectors with further columns, the first two of which add up to the bias.

    In float16, one would change the bias by up to 0.0002.
    """
    high = biases.astype(np.float16).astype(np.float32)
    further = np.zeros((len(vectors_nxD), _BIAS_COLUMNS), np.float32)
    further[:, 0], further[:, 1] = high, biases - high
    return np.concatenate([vectors_nxD, further], 1)


def repeated_rows(table: Any) -> pa.Array:
    """Returns the ids of rows that repeat a segment: two processes may add the same file.

    A folder is locked for one writer, which a bucket cannot be.
    """
    rows = table.search().select(["id"]).with_row_id(True).to_arrow().sort_by("_rowid")
    _, first = np.unique(rows["id"].to_numpy(zero_copy_only=False), return_index=True)
    return pa.array(np.delete(rows["_rowid"].to_numpy(), first))


@contextlib.contextmanager
def readable(location: str) -> Iterator[None]:
    """Raises database errors as InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # LanceDB has no common type, and may panic
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        problem = f"the index {location} cannot be read: {reason}"
        advice = "if it is corrupted, delete it and index the videos again"
        raise InputError(f"{problem}; {advice}") from error


def _to_matrix(column: Any, width: int) -> np.ndarray:
    """Converts an Arrow column of fixed-size lists to an array of `width` columns."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
