"""Reads one version of an index: vectors, names and times in memory, frames on demand."""

import functools
import logging
import threading
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xclip_jax.cli import InputError, list_some
from xclip_jax.search.digests import PARTS, are_intact
from xclip_jax.search.frames import FrameReader
from xclip_jax.search.readable import readable
from xclip_jax.search.row_ids import (
    WHOLE,
    Keys,
    Part,
    RowIds,
    RowKeys,
    find_places,
    is_id,
    read_keys,
    to_matrix,
)
from xclip_jax.search.selection import EVERYTHING, Selection
from xclip_jax.search.vectors import RowMask, Rows, Vectors, are_mergeable, unit_vectors
from xclip_jax.similarity import VideoFeatures

_BATCH_ROWS = 4096
_MAX_DEAD = 0.1  # fraction of rows in memory that may no longer be in the index
_TIES = 64  # further rows to look at, as the last of the nearest ones may be equal to others
_DEAD = -1
_KEPT = ("path", "start", "end", "offset", "mtime", "count", "times", "bias")


class Snapshot:
    """One version of an index, or of a part of it.

    Rows are numbered from 0. Those of a former version are followed by new ones, and those that
    are no longer in the index are dead: no search finds them.

    Of N rows: `row_ids` (LanceDB's, by which all parts know a row; -1: dead), `keys` (the ids of
    segments as numbers), `rows` (a table: path, start, end and offset in seconds, the latter from
    the start of the file to its first frame; mtime in ns, count of frames, times of the frames in
    seconds, hubness bias), `vectors` (L2-normalised video vectors in float16).
    """

    def __init__(
        self,
        location: str,
        about: Mapping[str, Any],
        table: Any,
        part: Part = WHOLE,
        *,
        former: "Snapshot | None" = None,
    ) -> None:
        """Reads the current version of a table.

        Args:
            location, about: of the index.
            table: the segments.
            part: the rows to hold.
            former: an earlier version of the same part. Only rows that are not in it are read.
        """
        self.version: int = table.version
        table.checkout(self.version)
        self._location, self._about, self._table = location, about, table
        self._last_filter: tuple[Any, RowMask | None] = ("none yet", None)
        names = table.schema.names
        self._kept = [name for name in (*_KEPT, "frames_digest") if name in names]
        every = read_keys(table)
        own = every.only(part.holds(every.row_ids))
        known = np.full(len(own.keys), -1)
        if former is not None and not len(former.row_ids):
            former = None
        if former is not None:
            known = former.find_keys(own.keys)
            known[former.contents[known] != own.contents] = -1
            if np.sum(known >= 0) < (1 - _MAX_DEAD) * len(former.row_ids):
                former, known = None, np.full(len(own.keys), -1)
        self.corrupted_rows = {} if former is None else dict(former.corrupted_rows)
        if former is None:
            self.row_ids, self.keys, self.contents = (np.zeros(0, t) for t in ("i8", "u8", "u8"))
            self.vectors = Vectors(about["embed_dim"], has_biases="bias" in names)
            self.pieces = [self._to_rows([])]
        else:
            self.row_ids = np.full(len(former.row_ids), _DEAD)
            self.row_ids[known[known >= 0]] = own.row_ids[known >= 0]
            self.keys, self.contents = former.keys, former.contents
            self.vectors, self.pieces = former.vectors, list(former.pieces)
        new = own.only(known < 0)
        if self.corrupted_rows:  # known from the former version
            pairs, left = set(_pairs(own)), self.corrupted_rows
            self.corrupted_rows = {pair: left[pair] for pair in pairs & left.keys()}
            new = new.only(np.array([pair not in left for pair in _pairs(new)], bool))
        self._read(new, scan=former is None and len(own.keys) == len(every.keys))
        self.rows = pa.concat_tables(self.pieces)

    @property
    def corrupted(self) -> set[str]:
        """Paths of segments that are left out."""
        return set(self.corrupted_rows.values())

    def _read(self, new: RowKeys, *, scan: bool) -> None:
        """Appends rows, of which corrupted ones are left out. `scan`: True if these are all."""
        batches: list[pa.RecordBatch] = []
        places: list[np.ndarray] = []  # of the rows of batches among the new ones

        def read_vectors() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch in self._read_batches(new.row_ids, scan=scan):
                found = batch["_rowid"].to_numpy().astype(np.int64)
                place = find_places(new.row_ids, np.arange(len(new.row_ids)), found)
                intact = are_intact(batch, "digest")
                for k in np.flatnonzero(~intact & (place >= 0)):
                    pair = int(new.keys[place[k]]), int(new.contents[place[k]])
                    self.corrupted_rows[pair] = batch["path"][int(k)].as_py()
                intact &= place >= 0  # not those that repeat others
                batch = batch.filter(pa.array(intact))
                batches.append(batch.drop_columns("video"))
                places.append(place[intact])
                vectors = unit_vectors(to_matrix(batch["video"], self.vectors.dim))
                has_bias = "bias" in batch.schema.names
                yield vectors, batch["bias"].to_numpy() if has_bias else np.zeros(len(vectors))

        if not len(new.row_ids):
            return
        num_corrupted = len(self.corrupted_rows)
        self.vectors = self.vectors.extended(read_vectors(), len(new.row_ids))
        self.pieces.append(self._to_rows(batches))
        # Small pieces are merged like the blocks of vectors.
        while len(self.pieces) > 1 and are_mergeable(*map(len, self.pieces[-2:])):
            self.pieces[-2:] = [pa.concat_tables(self.pieces[-2:]).combine_chunks()]
        order = np.concatenate([np.zeros(0, int), *places])
        self.keys = np.append(self.keys, new.keys[order])
        self.row_ids = np.append(self.row_ids, new.row_ids[order])
        self.contents = np.append(self.contents, new.contents[order])
        if len(self.corrupted_rows) > num_corrupted:
            paths = list_some(sorted(self.corrupted))
            logging.warning("segments are corrupted and left out: run index again for %s", paths)

    def _read_batches(self, row_ids: RowIds, *, scan: bool) -> Iterator[pa.RecordBatch]:
        names = [*PARTS["digest"], "digest", "frames_digest"]
        names = [name for name in names if name in self._table.schema.names]
        if scan:
            yield from self._table.search().select(names).with_row_id(True).to_batches(_BATCH_ROWS)
            return
        for start in range(0, len(row_ids), _BATCH_ROWS):
            query = self._table.take_row_ids(row_ids[start : start + _BATCH_ROWS].tolist())
            yield from query.select(names).with_row_id().to_arrow().to_batches()

    def _to_rows(self, batches: list[pa.RecordBatch]) -> pa.Table:
        """Returns the columns that are kept in memory, each in one piece."""
        schema = self._table.schema
        schema = pa.schema([(name, schema.field(name).type) for name in self._kept])
        rows = pa.Table.from_batches([batch.select(self._kept) for batch in batches], schema)
        times = pa.list_(pa.float32(), self._about["max_frames"])
        times = rows["times"].combine_chunks().cast(times)
        rows = rows.set_column(self._kept.index("times"), "times", times)
        return rows.combine_chunks()

    def __len__(self) -> int:
        return self._num_rows

    @functools.cached_property
    def _num_rows(self) -> int:
        return int(np.sum(self.row_ids != _DEAD))

    def find(self, segment_id: str) -> Rows:
        """Returns the row of a segment, or raises KeyError for an unknown id."""
        rows = list(self.rows_of([segment_id]).values())
        if not rows:
            raise KeyError(segment_id)
        return np.array(rows)

    def rows_of(self, ids: Collection[str]) -> dict[str, int]:
        """Returns {id: row} of the segments that exist."""
        known = [one for one in ids if is_id(one)]
        rows = self.find_keys(np.array([int(one, 16) for one in known], np.uint64))
        pairs = zip(known, rows.tolist(), strict=True)
        return {one: row for one, row in pairs if row >= 0}

    def find_keys(self, keys: Keys) -> Rows:
        """Returns the row of each key, -1 if there is none."""
        return find_places(*self._sorted_keys, keys)

    def find_row_ids(self, row_ids: RowIds) -> Rows:
        """Returns the row of each row id, -1 if there is none."""
        return find_places(*self._sorted_row_ids, row_ids)

    @functools.cached_property
    def _sorted_keys(self) -> tuple[Keys, Rows]:
        """The keys of living rows in increasing order, and their rows."""
        living = np.flatnonzero(self.row_ids != _DEAD)
        rows = living[np.argsort(self.keys[living])]
        return self.keys[rows], rows

    @functools.cached_property
    def _sorted_row_ids(self) -> tuple[RowIds, Rows]:
        living = np.flatnonzero(self.row_ids != _DEAD)
        rows = living[np.argsort(self.row_ids[living])]
        return self.row_ids[rows], rows

    def sample(self, count: int) -> Rows:
        """Returns the rows with the lowest ids, which are random, at most `count`."""
        return self._sorted_keys[1][:count]

    @functools.cached_property
    def films(self) -> pa.Table:
        """Table of the files: path, end_max (seconds), mtime_max (ns), row_id_min."""
        rows = self.rows.select(["path", "end", "mtime"])
        rows = rows.append_column("row_id", pa.array(self.row_ids))
        if self._num_rows < len(rows):
            rows = rows.filter(pa.array(self.row_ids != _DEAD))
        groups = rows.group_by("path", use_threads=False)
        return groups.aggregate([("end", "max"), ("mtime", "max"), ("row_id", "min")])

    @functools.cached_property
    def durations(self) -> dict[str, float]:
        """{path: end of the last segment in seconds} of the files."""
        return dict(zip(*(self.films[n].to_pylist() for n in ("path", "end_max")), strict=True))

    def mask(self, selection: Selection) -> RowMask | None:
        """Returns the mask of the selected rows, None if these are all."""
        filters, mask = self._last_filter
        if filters != selection.filters:  # pages of results have the same
            mask = self._filter(*selection.filters)
            self._last_filter = selection.filters, mask
        for row_ids, is_wanted in ((selection.only, True), (selection.without, False)):
            if row_ids is not None:
                rows = self.find_row_ids(row_ids)
                chosen = np.full(len(self.row_ids), not is_wanted)
                chosen[rows[rows >= 0]] = is_wanted
                mask = chosen if mask is None else mask & chosen
        return mask

    def _filter(self, path: str | None, start: float | None, end: float | None) -> RowMask | None:
        """Returns the mask of the living rows that pass `Filters`, None if all rows do."""
        mask = self.row_ids != _DEAD
        if path:
            path = unicodedata.normalize("NFC", path)
            pattern = path if any(c in path for c in "*?") else f"*{path}*"
            pattern = pattern if pattern.startswith("/") else f"*{pattern}"
            like = {"\\": r"\\", "%": r"\%", "_": r"\_", "*": "%", "?": "_"}
            options = pc.MatchSubstringOptions(pattern.translate(str.maketrans(like)))
            composed = pc.Utf8NormalizeOptions("NFC")
            paths = pc.call_function("utf8_normalize", [self.rows["path"]], composed)
            mask &= pc.call_function("match_like", [paths], options).to_numpy()
        if start is not None:
            mask &= self.rows["end"].to_numpy() > start
        if end is not None:
            mask &= self.rows["start"].to_numpy() <= end
        return None if mask.all() else mask

    def nearest(
        self,
        vector_1xD: np.ndarray,
        count: int,
        selection: Selection = EVERYTHING,
        *,
        subtract_bias: bool,
    ) -> tuple[Rows, np.ndarray]:
        """Returns the selected rows of largest inner product, best first, and these products.

        Of equal ones, those with the lower row id come first.

        Args:
            vector_1xD: the query.
            count: number of rows; all if there are fewer.
            selection: the rows to search.
            subtract_bias: True to rank by the inner product minus the hubness bias.
        """
        options: Any = {"subtract_bias": subtract_bias}
        mask, ties = self.mask(selection), _TIES
        while True:
            products, rows = self.vectors.search(vector_1xD, count + ties, mask, **options)
            order = np.lexsort((self.row_ids[rows], -products))[:count]
            # More equal ones than were asked for may exist where the nearest ones end.
            num_equal = np.sum(products == products[order[-1]]) if len(order) else 0
            if num_equal <= ties or ties > len(self.row_ids):
                return rows[order], products[order]
            ties *= 32

    def biases(self, rows: Rows) -> np.ndarray:
        """Returns the hubness biases of cosines, zeros in an index without a bank."""
        if "bias" not in self._kept:
            return np.zeros(len(rows), np.float32)
        return self.rows["bias"].take(rows).to_numpy()

    def frame_mask(self, rows: Rows) -> np.ndarray:
        """Returns the mask of the real frames, n x F."""
        counts = self.rows["count"].take(rows).to_numpy()
        return np.arange(self._about["max_frames"]) < counts[:, None]

    def times(self, rows: Rows) -> np.ndarray:
        """Returns the seconds of the frames, n x F."""
        return to_matrix(self.rows["times"].take(rows), self._about["max_frames"])

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
        row_ids = self.row_ids[rows].tolist()
        in_memory = digest == "frames_digest" and digest in self._kept
        names = [*columns, *({digest} & set(self._table.schema.names) - set(self._kept))]
        with readable(self._location):
            query = self._table.take_row_ids(row_ids).select(names)
            table = query.with_row_id().to_arrow()
            positions = {row_id: k for k, row_id in enumerate(table["_rowid"].to_pylist())}
            places = pa.array([positions[row_id] for row_id in row_ids], pa.int64())
            table = table.take(places)
        if in_memory:
            table = table.append_column(digest, self.rows[digest].take(rows))
        if digest:
            self._check(rows, table, digest)
        return table

    def _check(self, rows: Rows, table: pa.Table, digest: str) -> None:
        """Raises InputError unless what was read of rows has its checksums."""
        if not (intact := are_intact(table, digest)).all():
            path = self.rows["path"][int(rows[intact.argmin()])].as_py()
            problem = f"the index {self._location} is corrupted at a segment of {path}"
            raise InputError(f"{problem}: touch that file and index it again")

    @functools.cached_property
    def _frames(self) -> FrameReader:
        row_ids, rows = self._sorted_row_ids
        known = "frames_digest" in self._kept  # not in indexes of earlier versions
        digests = self.rows["frames_digest"].to_numpy()[rows] if known else None
        order: Any = {"row_ids": row_ids.astype(np.uint64), "keys": self.keys[rows]}
        names = self._location, self._table, self._frame_columns
        return FrameReader(*names, **order, digests=digests)

    @property
    def _frame_columns(self) -> list[str]:
        return [name for name in ("frames", "weights") if name in self._table.schema.names]

    def prefetch(self) -> threading.Event:
        """Starts to read the frames of an index in a bucket to the local disk, beside queries.

        Returns the event that ends it.
        """
        stopped = threading.Event()

        def run() -> None:
            try:
                self._frames.prefetch(stopped)
            except Exception:  # queries read what is missing
                logging.getLogger(__name__).debug("prefetching ended", exc_info=True)

        if "://" in self._location:
            threading.Thread(target=run, daemon=True).start()
        return stopped

    def features(self, rows: Rows, *, sum_frames: bool = False) -> VideoFeatures:
        """Reads the VideoFeatures of the given rows.

        `sum_frames`: True if a video vector is the normalised sum of its frames' (Eq. 2), which
        makes reading it unnecessary.
        """
        names, mask = self._frame_columns, self.frame_mask(rows)
        if sum_frames:
            with readable(self._location):
                table = self._frames.read(self.row_ids[rows].astype(np.uint64))
            self._check(rows, table, "frames_digest")
        else:
            table = self.read(rows, [*names, "video"], "frames_digest")
        frames = to_matrix(table["frames"], self._about["max_frames"] * self.vectors.dim)
        frames = frames.astype(np.float32, copy=False).reshape(*mask.shape, self.vectors.dim)
        if sum_frames:
            video = unit_vectors((mask[:, None].astype(np.float32) @ frames)[:, 0])
        else:
            video = to_matrix(table["video"], self.vectors.dim)
        weights = to_matrix(table["weights"], mask.shape[1]) if "weights" in names else None
        return VideoFeatures(video, frames, mask, weights)

    def tables(self) -> Iterator[pa.Table]:
        """Yields all columns except thumbnails and checksums as Arrow tables."""
        names = [n for n in self._table.schema.names if n not in ("thumbnail", "sample", *PARTS)]
        with readable(self._location):
            for batch in self._table.search().select(names).to_batches(_BATCH_ROWS):
                yield pa.Table.from_batches([batch])


def _pairs(rows: RowKeys) -> Iterator[tuple[int, int]]:
    return zip(rows.keys.tolist(), rows.contents.tolist(), strict=True)
