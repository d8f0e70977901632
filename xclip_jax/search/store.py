"""What an index keeps: a LanceDB database, in a folder or a bucket.

https://lancedb.github.io/lancedb. The table `segments` has a row a segment, `unreadable` a row for
each file that gave none. A commit is a version: whole or not there at all, whatever is killed, and
who reads a version is not disturbed by those who write the next.
"""

import contextlib
import datetime
import json
import os
import re
from pathlib import Path

import faiss
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xclip_jax.checkpoint import partial_folder
from xclip_jax.cli import InputError
from xclip_jax.similarity import VideoFeatures

FORMAT = 1  # raise it when older indexes can no longer be read
# One query is one thread's work in any case; idle threads of OpenMP spin for a while after it, and
# slow down what follows (on two cores, the reading of rows by a third).
faiss.omp_set_num_threads(1)
MOST_VERSIONS = 100
MOST_FRAGMENTS = 32  # files that reading 200 rows is not slowed down by
_ABOUT = b"xclip_jax"
_BATCH = 4096  # rows read at once


class Store:
    """An index on disk.

    Attributes:
        location: absolute folder, or URI.
        about: what it was made with: `model`, `fingerprint`, `max_frames`, `embed_dim`,
            `segment_seconds`, `shots`, `precision`.
    """

    def __init__(self, location):
        """Opens it.

        Raises:
            InputError: there is none, it is damaged, or of another version of this program.
        """
        self.location = _absolute(location)
        if not exists(self.location):
            raise InputError(
                f"no index in {self.location}: make one with "
                "python -m xclip_jax.search index VIDEOS --model=DIR --index=DIR"
            )
        with self.readable():
            self._database = lancedb.connect(self.location)
            self._segments = self._database.open_table("segments")
            self._unreadable = self._database.open_table("unreadable")
            self.about = json.loads(self._segments.schema.metadata[_ABOUT])
        if self.about["format"] != FORMAT:
            raise InputError(
                f"{self.location} is an index of format {self.about['format']}, and this program "
                f"reads format {FORMAT}: index the videos again"
            )

    @classmethod
    def create(cls, location, about):
        """Makes an empty one, whole or not at all; see `about` above."""
        location = _absolute(location)
        about = {"format": FORMAT, **about}
        numbers = {"float32": pa.float32(), "float16": pa.float16()}[about["precision"]]
        dim, frames = about["embed_dim"], about["max_frames"]
        schema = pa.schema(
            [
                ("id", pa.string()),
                *_FILE,
                ("start", pa.float64()),
                ("end", pa.float64()),
                ("count", pa.int32()),  # real frames; the rest of `times` and `frames` is 0
                ("times", pa.list_(pa.float64(), frames)),
                ("video", pa.list_(numbers, dim)),
                ("frames", pa.list_(numbers, frames * dim)),  # one block: nested lists are slow
                ("thumbnail", pa.binary()),
            ],
            metadata={_ABOUT: json.dumps(about).encode()},
        )
        unreadable = pa.schema([*_FILE, ("reason", pa.string())])
        in_folder = "://" not in location
        if exists(location):
            raise InputError(f"{location} holds an index already")
        if in_folder and os.path.exists(location) and os.listdir(location):
            raise InputError(f"{location} holds other things than an index: name a new folder")
        partial = partial_folder(location) if in_folder else location
        database = lancedb.connect(partial)
        database.create_table("unreadable", schema=unreadable, mode="overwrite")
        database.create_table("segments", schema=schema)  # last: by it an index is known
        if in_folder:
            os.replace(partial, location)
        return cls(location)

    def files(self):
        """{path: (size, mtime)} of the files in it, readable or not; several if it is ambiguous."""
        found = {}
        for table in (self._segments, self._unreadable):
            table.checkout_latest()
            with self.readable():
                rows = table.search().select(["path", "size", "mtime"]).to_arrow()
            for path, *stamp in zip(*(rows[name].to_pylist() for name in _NAMES), strict=True):
                found.setdefault(path, set()).add(tuple(stamp))
        return found

    def unreadable(self):
        """{path: reason}."""
        rows = self._unreadable.search().select(["path", "reason"]).to_arrow()
        return dict(zip(rows["path"].to_pylist(), rows["reason"].to_pylist(), strict=True))

    def add(self, rows):
        """Commits segments: a list of dicts, a key a column. Those that are there stay."""
        table = pa.Table.from_pylist(rows, self._segments.schema)
        self._segments.merge_insert("id").when_not_matched_insert_all().execute(table)

    def add_unreadable(self, rows):
        """Commits unreadable files: dicts with path, size, mtime, reason."""
        self._unreadable.add(pa.Table.from_pylist(rows, self._unreadable.schema))

    def remove(self, paths):
        """Commits the removal of all that is known of these files."""
        for start in range(0, len(paths), 500):
            names = ", ".join(f"'{_quoted(path)}'" for path in paths[start : start + 500])
            self._delete(f"path IN ({names})")

    def remove_old(self, stamps):
        """Commits the removal of all but the newest state of files: {path: (size, mtime)}."""
        old = [
            f"(path = '{_quoted(path)}' AND NOT (size = {size} AND mtime = {mtime}))"
            for path, (size, mtime) in stamps.items()
        ]
        for start in range(0, len(old), 100):
            self._delete(" OR ".join(old[start : start + 100]))

    def _delete(self, condition):
        for table in (self._segments, self._unreadable):
            if table.count_rows(condition):  # or it would be a version for nothing
                table.delete(condition)

    def tidy(self):
        """Joins the files of many commits, and removes versions older than an hour.

        Rarely: whatever has been joined before is written anew, up to a million rows.
        """
        for table in (self._segments, self._unreadable):
            table.checkout_latest()
            fragments = table.stats()["fragment_stats"]["num_fragments"]
            if fragments > MOST_FRAGMENTS or len(table.list_versions()) > MOST_VERSIONS:
                table.optimize(cleanup_older_than=datetime.timedelta(hours=1))

    def version(self):
        """A number that grows with every commit of segments."""
        with self.readable():
            self._segments.checkout_latest()
            return self._segments.version

    def snapshot(self):
        """The newest version, to be read."""
        with self.readable():
            return Snapshot(self, lancedb.connect(self.location).open_table("segments"))

    def readable(self):
        """A context that turns what the database says of damage into one line."""
        return _one_line(self.location)


class Snapshot:
    """A version of an index: what is needed of every segment in memory, the rest read when asked.

    Rows are numbered from 0.

    Attributes:
        version: its number.
        flat: faiss index of the unit video vectors; halves: these vectors, N x D float16.
        ids, paths: N strings (Arrow). starts, ends: N seconds. times: of the frames, N x F.
    """

    def __init__(self, store, table):
        self.version = table.version
        table.checkout(self.version)
        self._store, self._table = store, table
        self._frames, dim = store.about["max_frames"], store.about["embed_dim"]
        half = faiss.ScalarQuantizer.QT_fp16
        self.flat = faiss.IndexScalarQuantizer(dim, half, faiss.METRIC_INNER_PRODUCT)
        # It would grow by doubling, and copying: room for all at once, which the first `add` takes.
        self.flat.codes.resize(table.count_rows() * self.flat.code_size)
        names, kept = ["id", "path", "start", "end", "count", "times"], []
        query = table.search().select([*names, "video"]).with_row_id(True)
        for batch in query.to_batches(_BATCH):
            self.flat.add(unit_vectors(_matrix(batch["video"], dim)))
            kept.append(batch.select([*names, "_rowid"]))
        fields = [table.schema.field(name) for name in names]
        rows = pa.Table.from_batches(kept, pa.schema([*fields, ("_rowid", pa.uint64())]))
        self.ids, self.paths = rows["id"], rows["path"]
        self.starts, self.ends = rows["start"].to_numpy(), rows["end"].to_numpy()
        self.times = _matrix(rows["times"], self._frames).astype(np.float32)
        self._counts, self._row_ids = rows["count"].to_numpy(), rows["_rowid"].to_numpy()
        self.halves = np.zeros((0, dim), np.float16)
        if len(rows):
            codes = faiss.rev_swig_ptr(self.flat.codes.data(), self.flat.codes.size())
            self.halves = codes.view(np.float16).reshape(-1, dim)

    def __len__(self):
        return len(self.ids)

    @property
    def num_files(self):
        return len(pc.unique(self.paths))

    def row(self, segment_id):
        """The row of a segment; KeyError if there is none of that id."""
        row = pc.index(self.ids, segment_id).as_py()
        if row < 0:
            raise KeyError(segment_id)
        return row

    def matching(self, path=None, start=None, end=None):
        """Rows that fit, N bool, or None for all.

        Args:
            path: a part of the path; or with `*` (any characters) and `?` (any one) its end, or
                the whole of it if it begins with `/`.
            start, end: seconds; the segment must reach into what lies between.
        """
        conditions = []
        if path:
            pattern = path if any(c in path for c in "*?") else f"*{path}*"
            pattern = pattern if pattern.startswith("/") else f"*{pattern}"
            escaped = pattern.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
            like = escaped.replace("*", "%").replace("?", "_")
            conditions.append(pc.match_like(self.paths, like).to_numpy())
        if start is not None:
            conditions.append(self.ends > start)
        if end is not None:
            conditions.append(self.starts < end)
        return np.logical_and.reduce(conditions) if conditions else None

    def read(self, rows, columns):
        """Columns of some rows, in their order: an Arrow table."""
        row_ids = self._row_ids[rows]
        with self._store.readable():
            query = self._table.take_row_ids(row_ids.tolist()).select(columns)
            found = query.with_row_id().to_arrow()
            place = {row_id: k for k, row_id in enumerate(found["_rowid"].to_pylist())}
            return found.take([place[row_id] for row_id in row_ids.tolist()])

    def features(self, rows):
        """VideoFeatures of some rows, in their order; numbers as stored."""
        return self._features(rows, self.read(rows, ["video", "frames"]))

    def blocks(self, size=_BATCH):
        """Yields (rows, VideoFeatures) of all, block by block."""
        order = np.argsort(self._row_ids)
        query = self._table.search().select(["video", "frames"]).with_row_id(True)
        with self._store.readable():
            for batch in query.to_batches(size):
                row_ids = batch["_rowid"].to_numpy()
                rows = order[np.searchsorted(self._row_ids, row_ids, sorter=order)]
                yield rows, self._features(rows, batch)

    def tables(self, size=_BATCH):
        """Yields all columns but the thumbnails as Arrow tables."""
        names = [name for name in self._table.schema.names if name != "thumbnail"]
        with self._store.readable():
            for batch in self._table.search().select(names).to_batches(size):
                yield pa.Table.from_batches([batch])

    def _features(self, rows, found):
        dim = self.flat.d
        frames = _matrix(found["frames"], self._frames * dim).reshape(-1, self._frames, dim)
        mask = np.arange(self._frames) < self._counts[rows, None]
        return VideoFeatures(_matrix(found["video"], dim), frames, mask)


def exists(location):
    """Whether there is an index; InputError if the bucket cannot be asked."""
    location = _absolute(location)
    if "://" not in location:
        return Path(location, "segments.lance").is_dir()
    with _one_line(location):
        return "segments" in lancedb.connect(location).table_names()


@contextlib.contextmanager
def _one_line(location):
    try:
        yield
    except (RuntimeError, ValueError, OSError, KeyError, pa.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = re.sub(r",? *(at )?/(rustc|root)/.*", "", reason)[:300]  # a place in its source
        raise InputError(
            f"the index {location} cannot be read: {reason}; if it is damaged, delete it and "
            "index the videos again"
        ) from error


_FILE = [("path", pa.string()), ("size", pa.int64()), ("mtime", pa.int64())]
_NAMES = [name for name, _ in _FILE]


def _absolute(location):
    location = str(location)
    return location if "://" in location else os.path.abspath(location)


def _quoted(text):
    return text.replace("'", "''")


def unit_vectors(vectors):
    """L2-normalised along the last axis, float32; zeros stay zeros."""
    vectors = vectors.astype(np.float32, copy=False)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _matrix(array, width):
    """A column of fixed-size lists as rows."""
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
