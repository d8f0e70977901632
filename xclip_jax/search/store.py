"""Stores an index as a LanceDB database in a folder or a bucket.

See https://lancedb.github.io/lancedb. Table `segments` has one row per segment, `unreadable` one
row per file that could not be read, `bank` (if any) one per caption of the bank. Every commit is an
atomic version, and readers of one version are not affected by writers of the next.
"""

import dataclasses
import datetime
import functools
import json
import os
import random
import shutil
import textwrap
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa

from xclip_jax.cli import InputError, PathLike
from xclip_jax.search.bank import digest_bank
from xclip_jax.search.calibration import Calibration
from xclip_jax.search.digests import PARTS, add_digests
from xclip_jax.search.passages import FILE_FIELDS, Passages, to_sql
from xclip_jax.search.readable import find_table, readable
from xclip_jax.search.repeats import delete_repeated_rows
from xclip_jax.search.row_ids import WHOLE, Part
from xclip_jax.search.snapshot import Snapshot

FORMAT = 1  # increased when older indexes can no longer be read
MAX_VERSIONS = 100
MAX_FRAGMENTS = 32  # more files would slow down reading 200 rows
MAX_COMMITS = 8  # attempts of one that conflicts with those of other processes
_METADATA_KEY = b"xclip_jax"
FileStamp = tuple[int, int]  # size in bytes, modification time in ns


class ExistsError(InputError):
    """The error that there is an index already: another process may have just created it."""


class Store:
    """An index on disk.

    `location` is the absolute path of its folder or a URI, `about` its settings: `model`,
    `fingerprint`, `max_frames`, `embed_dim`, `segment_seconds`, `shots`, `precision` and, if it has
    a bank of captions, `bank`: their digest.
    """

    def __init__(self, location: PathLike) -> None:
        """Opens an index, or raises InputError if it is missing, corrupted or of another format."""
        self.location = _absolute(location)
        if not exists(self.location):
            command = "python -m xclip_jax.search index VIDEOS --model=DIR --index=DIR"
            raise InputError(f"no index in {self.location}: create one with {command}")
        with readable(self.location):
            database = lancedb.connect(self.location)
            self._segments = database.open_table("segments")
            self._unreadable = database.open_table("unreadable")
            self.passages = Passages(self.location)
            self.about: dict[str, Any] = json.loads(self._segments.schema.metadata[_METADATA_KEY])
        if self.about["format"] != FORMAT:
            problem = f"{self.location} is an index of format {self.about['format']}, not {FORMAT}"
            raise InputError(f"{problem}, which this version reads: index the videos again")

    @classmethod
    def create(
        cls, location: PathLike, about: Mapping[str, Any], bank: Sequence[str] = ()
    ) -> "Store":
        """Creates an empty index atomically: of several processes, one succeeds.

        `bank`: the captions of `check_bank`, or () for an index without hubness bias. Raises
        ExistsError if there is an index, InputError if the folder has other files.
        """
        about = {"format": FORMAT, **about} | ({"bank": digest_bank(bank)} if bank else {})
        location = _absolute(location)
        _check_new(location)
        folder, in_folder = location, "://" not in location
        try:
            if in_folder:
                folder = _hidden_name(location)
                os.makedirs(folder)
            retry_commit(lambda: _create_tables(folder, about, bank))
            if in_folder:
                os.replace(folder, location)  # fails if it has files
        except Exception as error:  # LanceDB has no common type
            _check_new(location)
            reason = textwrap.shorten(str(error), 300)
            raise InputError(f"no index can be created in {location!r}: {reason}") from None
        finally:
            if folder != location:  # it was not renamed
                shutil.rmtree(folder, ignore_errors=True)
        return cls(location)

    def bank(self) -> list[str]:
        """Returns the captions of the bank, [] without one, or raises InputError if corrupted."""
        if "bank" not in self.about:
            return []
        with readable(self.location):
            table = lancedb.connect(self.location).open_table("bank").to_arrow()
            captions = table["caption"].to_pylist()
            if digest_bank(captions) != self.about["bank"]:
                raise ValueError("the captions of its bank do not have their checksum")
        return captions

    def files(self) -> dict[str, dict[FileStamp, str | None]]:
        """Returns {path: {stamp: reason why the file could not be read, or None}}.

        A file has two stamps if a writer was killed while replacing it.
        """
        files: dict[str, dict[FileStamp, str | None]] = {}
        for table in (self._segments, self._unreadable):
            table.checkout_latest()
            names = [n for n in table.schema.names if n in ("path", "size", "mtime", "reason")]
            with readable(self.location):
                rows = table.search().select(names).to_arrow()
            for row in rows.group_by(names).aggregate([]).to_pylist():
                files.setdefault(row["path"], {})[row["size"], row["mtime"]] = row.get("reason")
        return files

    def add(self, segments: list[dict[str, Any]], unreadable: list[dict[str, Any]]) -> None:
        """Commits new rows, one dict of columns each, and skips segments that exist already."""
        if segments:
            rows = self._to_table(segments)

            def merge() -> None:
                self._segments.checkout_latest()
                self._segments.merge_insert("id").when_not_matched_insert_all().execute(rows)

            retry_commit(merge)
        self._add_unreadable(unreadable)

    def write_fragments(self, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Writes rows beside the index, where they are not read before a process appends them.

        Returns the arguments of `append`.
        """
        import lance  # an optional dependency

        dataset = lance.dataset(self._uri)
        fragments: Any = lance.fragment.write_fragments(
            self._to_table(segments), dataset, data_storage_version=dataset.data_storage_version
        )
        return [fragment.to_json() for fragment in fragments]

    def append(self, fragments: list[dict[str, Any]], unreadable: list[dict[str, Any]]) -> None:
        """Commits what `write_fragments` has written, and unreadable files, one dict each."""
        import lance

        if fragments:
            pieces = [lance.FragmentMetadata.from_json(json.dumps(one)) for one in fragments]
            operation = lance.LanceOperation.Append(pieces)

            def append() -> None:
                version = lance.dataset(self._uri).version
                lance.LanceDataset.commit(self._uri, operation, read_version=version)

            retry_commit(append)
        self._add_unreadable(unreadable)

    @property
    def _uri(self) -> str:
        return f"{self.location}/segments.lance"

    def _to_table(self, segments: list[dict[str, Any]]) -> pa.Table:
        """Returns rows of `segments` with their checksums."""
        fields = [field for field in self._segments.schema if field.name not in PARTS]
        table = pa.Table.from_pylist(segments, pa.schema(fields))
        has_digests = "digest" in self._segments.schema.names  # not in indexes of earlier versions
        return add_digests(table) if has_digests else table

    def _add_unreadable(self, files: list[dict[str, Any]]) -> None:
        if files:
            rows = pa.Table.from_pylist(files, self._unreadable.schema)
            retry_commit(lambda: (self._unreadable.checkout_latest(), self._unreadable.add(rows)))

    def remove(self, versions: Mapping[str, FileStamp | None]) -> None:
        """Commits the removal of files, {path: stamp of the version that stays, or None}."""
        files = list(versions.items())
        for start in range(0, len(files), 500):
            block = files[start : start + 500]
            paths = _to_sql(path for path, _ in block)
            staying = _to_sql(f"{s[0]}|{s[1]}|{path}" if s else "" for path, s in block)
            condition = f"path IN {paths} AND concat(size, '|', mtime, '|', path) NOT IN {staying}"
            retry_commit(functools.partial(self.passages.remove, condition))
            for table in (self._segments, self._unreadable):
                retry_commit(functools.partial(_delete, table, condition))

    def compact(self) -> None:
        """Merges small files and removes versions older than an hour, if there are many.

        Merging is expensive: it also rewrites data merged before, up to a million rows.
        """
        retry_commit(functools.partial(delete_repeated_rows, self._segments))
        for table in (self._segments, self._unreadable):
            retry_commit(functools.partial(_compact, table))

    def calibration(self) -> Calibration:
        """Returns the stored calibration, one without values if there is none."""
        with readable(self.location):
            table = find_table(self.location, "calibration")
            rows = [] if table is None else table.to_arrow().to_pylist()
        if not rows:
            return Calibration()
        return Calibration(**{**rows[0], "examples": tuple(rows[0]["examples"])})

    def save_calibration(self, calibration: Calibration) -> None:
        """Commits a calibration instead of the former one."""
        row = {**dataclasses.asdict(calibration), "examples": list(calibration.examples)}
        database = lancedb.connect(self.location)
        rows = pa.Table.from_pylist([row])
        retry_commit(lambda: database.create_table("calibration", rows, mode="overwrite"))

    def intervals(self) -> pa.Table:
        """Returns id, path, size, mtime, start and end of all segments."""
        self._segments.checkout_latest()
        names = ["id", "path", "size", "mtime", "start", "end"]
        with readable(self.location):
            return self._segments.search().select(names).to_arrow()

    def version(self) -> int:
        """Returns a number that grows with every commit of segments."""
        with readable(self.location):
            self._segments.checkout_latest()
            return self._segments.version

    def snapshot(
        self, part: Part = WHOLE, *, former: Snapshot | None = None, version: int | None = None
    ) -> Snapshot:
        """Returns a version, by default the latest, or a part of it. See `Snapshot`."""
        with readable(self.location):
            table = lancedb.connect(self.location).open_table("segments")
            if version is not None:
                table.checkout(version)
            return Snapshot(self.location, self.about, table, part, former=former)


def _create_tables(folder: str, about: Mapping[str, Any], bank: Sequence[str]) -> None:
    """Creates the tables that do not exist, or raises ExistsError if all do."""
    _check_missing(folder)
    database = lancedb.connect(folder)
    unreadable = pa.schema([*FILE_FIELDS, ("reason", pa.string())])
    database.create_table("unreadable", schema=unreadable, exist_ok=True)
    if bank:
        captions = pa.table({"caption": pa.array(bank)})
        database.create_table("bank", captions, mode="overwrite")
    Passages(folder).create()
    # Created last: `exists` looks for this table.
    database.create_table("segments", schema=_segment_schema(about))


def retry_commit(function: Callable[[], Any]) -> None:
    """Calls a function that commits, again if it fails: other processes may commit as well."""
    for attempt in range(MAX_COMMITS):
        try:
            function()
            return
        except ExistsError:
            raise
        except Exception:  # LanceDB has no common type
            if attempt + 1 == MAX_COMMITS:
                raise
            time.sleep(random.uniform(0, 0.05 * 2**attempt))


def _delete(table: Any, condition: str) -> None:
    table.checkout_latest()
    if table.count_rows(condition):  # an empty delete would commit a version
        table.delete(condition)


def _compact(table: Any) -> None:
    table.checkout_latest()
    fragments = table.stats()["fragment_stats"]["num_fragments"]
    if fragments > MAX_FRAGMENTS or len(table.list_versions()) > MAX_VERSIONS:
        table.optimize(cleanup_older_than=datetime.timedelta(hours=1))


def exists(location: PathLike) -> bool:
    """Returns True if there is an index, or raises InputError if a bucket cannot be accessed."""
    location = _absolute(location)
    if "://" not in location:
        return Path(location, "segments.lance").is_dir()
    with readable(location):
        return find_table(location, "segments") is not None


def _check_new(location: str) -> None:
    """Raises ExistsError if there is an index, InputError if the folder has other files."""
    _check_missing(location)
    if "://" not in location and os.path.exists(location) and os.listdir(location):
        raise InputError(f"{location} is not empty and not an index: choose a new folder")


def _check_missing(location: str) -> None:
    if exists(location):
        raise ExistsError(f"there is already an index in {location}")


def _hidden_name(location: str) -> str:
    """Returns the path of a folder next to a future index, which only this process uses."""
    parent, name = os.path.split(location)
    return os.path.join(parent, f".{name}.{uuid.uuid4().hex}.xclip_jax-partial")


def _segment_schema(about: Mapping[str, Any]) -> pa.Schema:
    number = pa.from_numpy_dtype(about["precision"])
    dim, max_frames = about["embed_dim"], about["max_frames"]
    fields = [
        ("id", pa.string()),
        *FILE_FIELDS,
        ("start", pa.float64()),
        ("end", pa.float64()),
        # These two are not in old indexes.
        ("offset", pa.float64()),  # from the start of the file to its first frame
        ("sample", pa.int64()),  # of the file's content, see `sample_file`
        ("count", pa.int32()),  # real frames; the rest of `times` and `frames` is 0
        ("times", pa.list_(pa.float64(), max_frames)),
        ("video", pa.list_(number, dim)),
        ("frames", pa.list_(number, max_frames * dim)),  # one list: nested lists are slow
        # Logits of the frames' weights, if the model has some.
        *([("weights", pa.list_(number, max_frames))] if "frame_weights" in about else []),
        *([("bias", pa.float32())] if "bank" in about else []),  # see metrics.hubness_bias
        ("thumbnail", pa.binary()),
        *((part, pa.int64()) for part in PARTS),
    ]
    return pa.schema(fields, metadata={_METADATA_KEY: json.dumps(about).encode()})


def _absolute(location: PathLike) -> str:
    location = str(location)
    return location if "://" in location else os.path.abspath(location)


def _to_sql(texts: Iterable[str]) -> str:
    """Returns a list of SQL strings in parentheses."""
    return f"({', '.join(map(to_sql, texts))})"
