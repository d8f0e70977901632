"""Stores an index as a LanceDB database in a folder or a bucket.

See https://lancedb.github.io/lancedb. Table `segments` has one row per segment, `unreadable` one
row per file that could not be read. Every commit is an atomic version, and readers of one version
are not affected by writers of the next.
"""

import contextlib
import datetime
import json
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import faiss
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from xclip_jax.checkpoint import partial_folder
from xclip_jax.cli import InputError
from xclip_jax.similarity import VideoFeatures

FORMAT = 1  # increased when older indexes can no longer be read
MAX_VERSIONS = 100
MAX_FRAGMENTS = 32  # more files would slow down reading 200 rows
FileStamp = tuple[int, int]  # size in bytes, modification time in ns
_METADATA_KEY = b"xclip_jax"
_BATCH_ROWS = 4096
_FILE_FIELDS = [("path", pa.string()), ("size", pa.int64()), ("mtime", pa.int64())]


class Store:
    """An index on disk.

    Attributes:
        location: absolute path of the folder, or URI.
        about: settings fixed when the index was made: `model`, `fingerprint`, `max_frames`,
            `embed_dim`, `segment_seconds`, `shots`, `precision`.
    """

    def __init__(self, location: str | os.PathLike) -> None:
        """Opens an index.

        Raises:
            InputError: there is no index, or it is corrupted or of another format version.
        """
        self.location = _absolute(location)
        if not exists(self.location):
            raise InputError(
                f"no index in {self.location}: create one with "
                "python -m xclip_jax.search index VIDEOS --model=DIR --index=DIR"
            )
        with self.readable():
            self._database = lancedb.connect(self.location)
            self._segments = self._database.open_table("segments")
            self._unreadable = self._database.open_table("unreadable")
            self.about: dict[str, Any] = json.loads(self._segments.schema.metadata[_METADATA_KEY])
        if self.about["format"] != FORMAT:
            raise InputError(
                f"{self.location} is an index of format {self.about['format']}, but this version "
                f"reads format {FORMAT}: index the videos again"
            )

    @classmethod
    def create(cls, location: str | os.PathLike, about: Mapping[str, Any]) -> "Store":
        """Creates an empty index, atomically.

        Raises:
            InputError: there is an index already, or the folder has other files in it.
        """
        location = _absolute(location)
        in_folder = "://" not in location
        if exists(location):
            raise InputError(f"there is already an index in {location}")
        if in_folder and os.path.exists(location) and os.listdir(location):
            raise InputError(f"{location} is not empty and not an index: choose a new folder")
        folder = str(partial_folder(location)) if in_folder else location
        database = lancedb.connect(folder)
        unreadable = pa.schema([*_FILE_FIELDS, ("reason", pa.string())])
        database.create_table("unreadable", schema=unreadable, mode="overwrite")
        # Created last: `exists` looks for this table.
        database.create_table("segments", schema=_segment_schema({"format": FORMAT, **about}))
        if in_folder:
            os.replace(folder, location)
        return cls(location)

    def files(self) -> dict[str, set[FileStamp]]:
        """Returns {path: stamps}, with two stamps if a writer was killed while replacing a file."""
        stamps: dict[str, set[FileStamp]] = {}
        for table in (self._segments, self._unreadable):
            table.checkout_latest()
            with self.readable():
                rows = table.search().select([name for name, _ in _FILE_FIELDS]).to_arrow()
            columns = (rows[name].to_pylist() for name, _ in _FILE_FIELDS)
            for path, size, mtime in zip(*columns, strict=True):
                stamps.setdefault(path, set()).add((size, mtime))
        return stamps

    def unreadable(self) -> dict[str, str]:
        """Returns {path: reason} of the files that could not be read."""
        rows = self._unreadable.search().select(["path", "reason"]).to_arrow()
        return dict(zip(rows["path"].to_pylist(), rows["reason"].to_pylist(), strict=True))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Commits segments, one dict of columns each, and skips ids that exist already."""
        table = pa.Table.from_pylist(rows, self._segments.schema)
        self._segments.merge_insert("id").when_not_matched_insert_all().execute(table)

    def add_unreadable(self, rows: list[dict[str, Any]]) -> None:
        """Records unreadable files, one dict of path, size, mtime and reason each."""
        self._unreadable.add(pa.Table.from_pylist(rows, self._unreadable.schema))

    def remove(self, paths: Sequence[str]) -> None:
        """Commits the removal of files."""
        for start in range(0, len(paths), 500):
            names = ", ".join(f"'{_escape(path)}'" for path in paths[start : start + 500])
            self._delete(f"path IN ({names})")

    def remove_outdated(self, stamps: Mapping[str, FileStamp]) -> None:
        """Commits the removal of all versions of files except the given ones, {path: stamp}."""
        outdated = [
            f"(path = '{_escape(path)}' AND NOT (size = {size} AND mtime = {mtime}))"
            for path, (size, mtime) in stamps.items()
        ]
        for start in range(0, len(outdated), 100):
            self._delete(" OR ".join(outdated[start : start + 100]))

    def _delete(self, condition: str) -> None:
        for table in (self._segments, self._unreadable):
            if table.count_rows(condition):  # an empty delete would commit a version
                table.delete(condition)

    def compact(self) -> None:
        """Merges small files and removes versions older than an hour, if there are many.

        Merging is expensive: it also rewrites data merged before, up to a million rows.
        """
        for table in (self._segments, self._unreadable):
            table.checkout_latest()
            stats: Any = table.stats()
            fragments = stats["fragment_stats"]["num_fragments"]
            if fragments > MAX_FRAGMENTS or len(table.list_versions()) > MAX_VERSIONS:
                table.optimize(cleanup_older_than=datetime.timedelta(hours=1))

    def version(self) -> int:
        """Returns a number that grows with every commit of segments."""
        with self.readable():
            self._segments.checkout_latest()
            return self._segments.version

    def snapshot(self) -> "Snapshot":
        """Returns the latest version for reading."""
        with self.readable():
            return Snapshot(self, lancedb.connect(self.location).open_table("segments"))

    def readable(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context that raises database errors as InputError."""
        return _readable(self.location)


class Filters(TypedDict, total=False):
    """Conditions that restrict a search to some segments, where None means no restriction.

    Attributes:
        path: part of the path; with the wildcards `*` (any characters) and `?` (any one), a pattern
            of the end of the path, or of the whole path if it begins with `/`.
        start, end: seconds; the segment must overlap this interval of its file.
    """

    path: str | None
    start: float | None
    end: float | None


class Snapshot:
    """One version of an index: vectors, names and times in memory, frames read on demand.

    Rows are numbered from 0.

    Attributes:
        version: the version number.
        vector_index: faiss index of the L2-normalised video vectors.
        vectors_NxD: the same vectors, float16.
        ids, paths: N strings (Arrow).
        starts, ends: N seconds.
        times: seconds of the frames, N x F.
    """

    def __init__(self, store: Store, table: Any) -> None:
        # A query is single-threaded in faiss; idle OpenMP threads would busy-wait after it and
        # slow down what follows (on two cores, reading rows by a third).
        faiss.omp_set_num_threads(1)
        self.version: int = table.version
        table.checkout(self.version)
        self._store, self._table = store, table
        self._max_frames, dim = store.about["max_frames"], store.about["embed_dim"]
        self.vector_index = faiss.IndexScalarQuantizer(
            dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        # Allocated once: growing by doubling would copy. The first `add` starts at row 0.
        codes = self.vector_index.codes
        codes.resize(table.count_rows() * self.vector_index.code_size)
        names = ["id", "path", "start", "end", "count", "times"]
        query = table.search().select([*names, "video"]).with_row_id(True)
        batches = []
        for batch in query.to_batches(_BATCH_ROWS):
            self.vector_index.add(unit_vectors(_to_matrix(batch["video"], dim)))
            batches.append(batch.select([*names, "_rowid"]))
        fields = [table.schema.field(name) for name in names]
        rows = pa.Table.from_batches(batches, pa.schema([*fields, ("_rowid", pa.uint64())]))
        self.ids, self.paths = rows["id"], rows["path"]
        self.starts, self.ends = rows["start"].to_numpy(), rows["end"].to_numpy()
        self.times = _to_matrix(rows["times"], self._max_frames).astype(np.float32)
        self._counts, self._row_ids = rows["count"].to_numpy(), rows["_rowid"].to_numpy()
        self.vectors_NxD = np.zeros((0, dim), np.float16)
        if len(rows):
            view = faiss.rev_swig_ptr(codes.data(), codes.size())
            self.vectors_NxD = view.view(np.float16).reshape(-1, dim)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_files(self) -> int:
        """Number of files."""
        return len(self.paths.unique())

    def row(self, segment_id: str) -> int:
        """Returns the row of a segment, or raises KeyError for an unknown id."""
        row = pc.index(self.ids, segment_id).as_py()
        if row < 0:
            raise KeyError(segment_id)
        return row

    def matching_rows(
        self, path: str | None = None, start: float | None = None, end: float | None = None
    ) -> Bool[np.ndarray, " N"] | None:
        """Returns the mask of the rows that pass `Filters`, or None if there are no filters."""
        masks = []
        if path:
            pattern = path if any(c in path for c in "*?") else f"*{path}*"
            pattern = pattern if pattern.startswith("/") else f"*{pattern}"
            escaped = pattern.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
            like = escaped.replace("*", "%").replace("?", "_")
            options = pc.MatchSubstringOptions(like)
            masks.append(pc.call_function("match_like", [self.paths], options).to_numpy())
        if start is not None:
            masks.append(self.ends > start)
        if end is not None:
            masks.append(self.starts < end)
        return np.logical_and.reduce(masks) if masks else None

    def read(self, rows: Int[np.ndarray, " n"], columns: list[str]) -> pa.Table:
        """Reads columns of the given rows, in that order."""
        row_ids = self._row_ids[rows].tolist()
        with self._store.readable():
            query = self._table.take_row_ids(row_ids).select(columns)
            table = query.with_row_id().to_arrow()
            positions = {row_id: k for k, row_id in enumerate(table["_rowid"].to_pylist())}
            return table.take([positions[row_id] for row_id in row_ids])

    def features(self, rows: Int[np.ndarray, " n"]) -> VideoFeatures:
        """Reads the VideoFeatures of the given rows, in the stored precision."""
        return self._features(rows, self.read(rows, ["video", "frames"]))

    def blocks(
        self, size: int = _BATCH_ROWS
    ) -> Iterator[tuple[Int[np.ndarray, " n"], VideoFeatures]]:
        """Yields (rows, VideoFeatures) of all rows, in blocks of at most `size`."""
        order = np.argsort(self._row_ids)
        query = self._table.search().select(["video", "frames"]).with_row_id(True)
        with self._store.readable():
            for batch in query.to_batches(size):
                row_ids = batch["_rowid"].to_numpy()
                rows = order[np.searchsorted(self._row_ids, row_ids, sorter=order)]
                yield rows, self._features(rows, batch)

    def tables(self, size: int = _BATCH_ROWS) -> Iterator[pa.Table]:
        """Yields all columns except the thumbnails as Arrow tables of at most `size` rows."""
        names = [name for name in self._table.schema.names if name != "thumbnail"]
        with self._store.readable():
            for batch in self._table.search().select(names).to_batches(size):
                yield pa.Table.from_batches([batch])

    def _features(self, rows: Int[np.ndarray, " n"], table: Any) -> VideoFeatures:
        dim = self.vector_index.d
        frames = _to_matrix(table["frames"], self._max_frames * dim)
        mask = np.arange(self._max_frames) < self._counts[rows, None]
        return VideoFeatures(
            _to_matrix(table["video"], dim), frames.reshape(-1, self._max_frames, dim), mask
        )


def exists(location: str | os.PathLike) -> bool:
    """Returns True if there is an index, or raises InputError if a bucket cannot be accessed."""
    location = _absolute(location)
    if "://" not in location:
        return Path(location, "segments.lance").is_dir()
    with _readable(location):
        return "segments" in lancedb.connect(location).table_names()


def unit_vectors(vectors: Float[np.ndarray, "*rows D"]) -> Float[np.ndarray, "*rows D"]:
    """Returns float32 vectors L2-normalised along the last axis, where zeros stay zeros."""
    vectors = vectors.astype(np.float32, copy=False)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _segment_schema(about: Mapping[str, Any]) -> pa.Schema:
    number = {"float32": pa.float32(), "float16": pa.float16()}[about["precision"]]
    dim, max_frames = about["embed_dim"], about["max_frames"]
    fields = [
        ("id", pa.string()),
        *_FILE_FIELDS,
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("count", pa.int32()),  # real frames; the rest of `times` and `frames` is 0
        ("times", pa.list_(pa.float64(), max_frames)),
        ("video", pa.list_(number, dim)),
        ("frames", pa.list_(number, max_frames * dim)),  # one list: nested lists are slow
        ("thumbnail", pa.binary()),
    ]
    return pa.schema(fields, metadata={_METADATA_KEY: json.dumps(about).encode()})


@contextlib.contextmanager
def _readable(location: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError, KeyError, pa.ArrowException) as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise InputError(
            f"the index {location} cannot be read: {reason}; if it is corrupted, delete it and "
            "index the videos again"
        ) from error


def _absolute(location: str | os.PathLike) -> str:
    location = str(location)
    return location if "://" in location else os.path.abspath(location)


def _escape(text: str) -> str:
    return text.replace("'", "''")


def _to_matrix(column: Any, width: int) -> np.ndarray:
    """Converts an Arrow column of fixed-size lists to an array of `width` columns."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
