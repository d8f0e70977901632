"""Tests of reading frames from a folder, and from a stand-in for S3 through the cache."""

import dataclasses
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from s3 import s3

from xclip_jax.search import frames, row_cache
from xclip_jax.search.digests import are_intact, compute_digests
from xclip_jax.search.frames import FrameReader
from xclip_jax.search.row_cache import RowCache

__all__ = ["s3"]  # the fixture
WIDTH = 60
COLUMNS = ["frames", "weights"]
REQUEST_BYTES = 6 * 2**20 * (4 * WIDTH) // 24_576  # of rows of 240 bytes instead of 24 kB
ROOT = Path(__file__).parents[1]


def make_rows(first, count, *, width=WIDTH, seed=0):
    """Returns rows of a table of segments, with `width` numbers each."""
    rng = np.random.default_rng([seed, first])
    values = rng.standard_normal((count, width), np.float32)
    rows = {
        "id": [f"{n:016x}" for n in range(first, first + count)],
        "frames": pa.FixedSizeListArray.from_arrays(values.reshape(-1), width),
        "weights": pa.array(rng.standard_normal(count).astype(np.float16)),
        "thumbnail": [bytes(100)] * count,
    }
    table = pa.table(rows)
    digests = compute_digests(table.select(COLUMNS), "frames_digest")
    return table.append_column("frames_digest", pa.array(digests))


@dataclasses.dataclass
class Made:
    """A table of segments, and a folder for the cache."""

    location: str
    table: Any
    cache: Path

    def rows(self):
        return self.table.search().select(["id"]).with_row_id(True).to_arrow()

    def reader(self, **options):
        rows = self.rows()
        options.setdefault("folder", self.cache)
        keys = np.array([int(x, 16) for x in rows["id"].to_pylist()], np.uint64)
        options = {"row_ids": rows["_rowid"].to_numpy(), "keys": keys, **options}
        return FrameReader(self.location, self.table, COLUMNS, **options)

    def read_all(self):
        """Returns {row id: (frames, weights)}, read without a FrameReader."""
        table = self.table.search().select(COLUMNS).with_row_id(True).to_arrow()
        columns = table["frames"].to_pylist(), table["weights"].to_pylist()
        return dict(zip(table["_rowid"].to_pylist(), zip(*columns, strict=True), strict=True))


def make(location, cache, *, fragments=6, rows=400, width=WIDTH):
    """Makes a table of `fragments` times `rows` rows."""
    table = None
    for first in range(0, fragments * rows, rows):
        new = make_rows(first, rows, width=width)
        if table is None:
            table = lancedb.connect(location).create_table("segments", new, mode="overwrite")
        else:
            table.add(new)
    return Made(location, table, cache)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Scales the sizes to rows of 240 bytes."""
    monkeypatch.setattr(frames, "REQUEST_BYTES", REQUEST_BYTES)
    monkeypatch.setattr(row_cache, "FILE_BYTES", 2**14)


@pytest.fixture
def in_bucket(s3, tmp_path):
    return make(s3.uri, tmp_path / "cache")


def check(made, reader, row_ids):
    """Asserts that a reader returns the rows that the table has."""
    expected, table = made.read_all(), reader.read(row_ids)
    values = zip(table["frames"].to_pylist(), table["weights"].to_pylist(), strict=True)
    assert list(values) == [expected[int(row_id)] for row_id in row_ids]


def choose(made, count, seed=0):
    return np.random.default_rng(seed).choice(made.rows()["_rowid"].to_numpy(), count)


def data_requests(s3):
    """Returns the number of requests to data files, and of the bytes in their ranges."""
    ranges = [r for method, path, r in s3.requests if method == "GET" and "/data/" in path]
    ends = [tuple(map(int, r.removeprefix("bytes=").split("-"))) for r in ranges if r]
    return len(ranges), sum(stop - start + 1 for start, stop in ends)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_rows_are_those_of_the_table_in_any_order(place, tmp_path, request):
    location = request.getfixturevalue("s3").uri if place == "bucket" else str(tmp_path / "index")
    made = make(location, tmp_path / "cache", fragments=3)
    for change in ("none", "delete", "compact", "add"):
        if change == "delete":
            made.table.delete("id < '0000000000000010' OR id BETWEEN '0000000000000200' AND '3'")
        elif change == "compact":
            made.table.optimize()
        elif change == "add":
            made.table.add(make_rows(3000, 50))
        reader = made.reader()
        for seed, count in enumerate((1, 7, 300)):  # with repeats
            chosen = choose(made, count, seed)
            check(made, reader, chosen)
            check(made, reader, chosen.tolist())
        check(made, reader, [])
    with pytest.raises(LookupError):
        reader.read([2**40])
    assert (tmp_path / "cache").exists() == (place == "bucket")


def test_rows_in_any_order_of_the_constructor(in_bucket):
    rows = in_bucket.rows().take(np.random.default_rng(0).permutation(2400))
    keys = np.array([int(x, 16) for x in rows["id"].to_pylist()], np.uint64)
    reader = in_bucket.reader(row_ids=rows["_rowid"].to_numpy(), keys=keys)
    check(in_bucket, reader, choose(in_bucket, 100))


def test_a_small_index_takes_few_requests(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "REQUEST_BYTES", 6 * 2**20)  # rows of 24 kB
    monkeypatch.setattr(row_cache, "FILE_BYTES", 2**23)
    made = make(s3.uri, tmp_path / "cache", rows=200, width=6144)
    reader, chosen = made.reader(), choose(made, 100)
    s3.requests.clear()
    cold = reader.read(chosen)
    # Of each of six files: one range, the tail and the metadata of the columns.
    assert 6 <= data_requests(s3)[0] == len(s3.requests) <= 6 * 4
    s3.requests.clear()
    assert reader.read(chosen[::-1]).equals(cold.take(pa.array(np.arange(100)[::-1])))
    assert not s3.requests
    reader.read(choose(made, 100, seed=1))
    assert data_requests(s3)[0] <= 20  # most other rows were between those
    check(made, reader, chosen)


def test_a_large_index_is_not_read_for_200_rows(s3, tmp_path, monkeypatch):
    made = make(s3.uri, tmp_path / "cache", fragments=2, rows=6000)
    monkeypatch.setattr(frames, "MAX_RANGE_BYTES", 6000 * 4 * WIDTH)
    monkeypatch.setattr(frames, "REQUEST_BYTES", 1000 * 4 * WIDTH)
    chosen = made.rows()["_rowid"].to_numpy()[::600]
    reader = made.reader()
    reader.read(chosen[:1])
    s3.requests.clear()
    reader.read(chosen)
    _, num_bytes = data_requests(s3)
    assert num_bytes < 12_000 * 4 * WIDTH / 8
    s3.requests.clear()
    check(made, reader, chosen)
    s3.requests.clear()
    reader.read(chosen)
    assert not s3.requests
    num_stored = reader._cache.has(reader._row_ids, reader._keys).sum()
    assert num_stored == len(chosen)


def test_a_second_process_makes_no_request(in_bucket, s3, tmp_path):
    reader, chosen = in_bucket.reader(), choose(in_bucket, 50)
    table = reader.read(chosen)
    np.savez(tmp_path / "rows.npz", rows=reader._row_ids, keys=reader._keys, chosen=chosen)
    program = f"""
import lancedb, numpy as np, pathlib
from xclip_jax.search import row_cache
from xclip_jax.search.frames import FrameReader
row_cache.FILE_BYTES = {row_cache.FILE_BYTES}
table = lancedb.connect({s3.uri!r}).open_table("segments")
file = np.load({str(tmp_path / "rows.npz")!r})
options = dict(row_ids=file["rows"], keys=file["keys"])
options["folder"] = pathlib.Path({str(in_bucket.cache)!r})
rows = FrameReader({s3.uri!r}, table, {COLUMNS!r}, **options).read(file["chosen"])
print(float(np.sum(rows["frames"].combine_chunks().flatten().to_numpy()[:WIDTH])))
""".replace("WIDTH", str(WIDTH))
    s3.requests.clear()
    output = run(program)
    assert data_requests(s3)[0] == 0
    assert float(output) == float(np.sum(np.array(table["frames"][0].as_py(), np.float32)))


def run(program):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 100}
    return subprocess.run([sys.executable, "-c", program], check=True, **options).stdout


def test_prefetch_reads_all_rows_in_large_ranges(in_bucket, s3):
    reader = in_bucket.reader()
    s3.requests.clear()
    assert reader.prefetch() == 2400
    assert data_requests(s3)[0] <= 24
    s3.requests.clear()
    assert reader.prefetch() == 0
    reader.read(reader._row_ids)
    assert not s3.requests
    in_bucket.table.add(make_rows(5000, 30))
    assert in_bucket.reader().prefetch() == 30
    stopped = threading.Event()
    stopped.set()
    assert in_bucket.reader(folder=in_bucket.cache.parent / "other").prefetch(stopped) == 0


def size(folder):
    """Returns the number of bytes of the files below a folder."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())


def test_the_cache_keeps_its_limit(in_bucket):
    limit = 200_000
    reader = in_bucket.reader(cache_bytes=limit)
    num_read = reader.prefetch()
    assert 500 < num_read < 1000
    for seed in range(5):
        check(in_bucket, reader, choose(in_bucket, 200, seed))
        assert size(in_bucket.cache) <= limit
    assert size(in_bucket.cache) > limit // 2


def test_what_was_not_used_for_longest_is_removed(tmp_path):
    dtype = np.dtype([("frames", np.float32, (WIDTH,))])
    cache = RowCache(tmp_path, "a", dtype, limit=100_000)
    old, new = (RowCache(tmp_path, name, dtype, limit=100_000) for name in ("old", "new"))
    ids, keys = np.arange(60, dtype=np.uint64), np.arange(1, 61, dtype=np.uint64)
    content = np.zeros(60, dtype)
    content["frames"] = np.arange(60)[:, None]
    for one in (old, new):
        one.store(ids, keys, content)
        time.sleep(0.02)
    assert old.load(ids, keys)[1].all()  # used
    time.sleep(0.02)
    for fragment in range(1, 6):
        cache.store(ids + (np.uint64(fragment) << np.uint64(32)), keys, content)
    assert old.load(ids, keys)[1].all()
    assert not new.load(ids, keys)[1].any()


@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "key"])
def test_corrupted_files_are_read_again(in_bucket, s3, damage):
    reader, chosen = in_bucket.reader(), choose(in_bucket, 100)
    reader.prefetch()
    for path in in_bucket.cache.glob("*/*"):
        content = bytearray(path.read_bytes())
        if damage in ("bit", "key"):
            for place in range(0 if damage == "key" else 40, len(content), 50):
                content[place] ^= 4
        path.write_bytes(content[: {"truncated": len(content) // 3, "empty": 0}.get(damage)])
    check(in_bucket, reader, chosen)
    s3.requests.clear()
    reader.read(chosen)
    assert not s3.requests


def test_rows_that_differ_from_their_checksum_are_not_cached(in_bucket):
    digests = in_bucket.table.to_arrow()["frames_digest"].to_numpy().copy()
    digests[7] += 1
    reader = in_bucket.reader(digests=digests)
    table = reader.read([7, 8, 2**32, 7])
    assert table.column_names == [*COLUMNS, "frames_digest"]
    assert are_intact(table, "frames_digest").tolist() == [False, True, True, False]
    is_stored = reader._cache.has(reader._row_ids, reader._keys)
    assert is_stored[8]
    assert not is_stored[7]
    digests[8] += 1  # as of an index whose segment has the same id and other content
    is_stored = reader._cache.has(reader._row_ids, in_bucket.reader(digests=digests)._keys)
    assert not is_stored[8]


def test_another_index_at_the_same_place_is_not_mixed_up(s3, tmp_path):
    made = make(s3.uri, tmp_path / "cache", fragments=1)
    made.reader().prefetch()
    old = made.read_all()
    lancedb.connect(s3.uri).drop_table("segments")
    table = lancedb.connect(s3.uri).create_table("segments", make_rows(10_000, 400, seed=1))
    made = Made(s3.uri, table, tmp_path / "cache")
    chosen = choose(made, 30)
    assert made.read_all().keys() == old.keys()  # the same row ids
    check(made, made.reader(), chosen)


def test_a_cache_that_cannot_be_written_is_left_out(in_bucket, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    reader = in_bucket.reader(folder=tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            check(in_bucket, reader, choose(in_bucket, 50, seed))
    assert len(caplog.records) == 1
    assert reader.prefetch() == 0


def test_threads_read_the_same_ranges_once(in_bucket, s3):
    reader, chosen = in_bucket.reader(), choose(in_bucket, 200)
    reader.read(chosen[:1])
    s3.requests.clear()
    tables = [None] * 4

    def read(number):
        tables[number] = reader.read(chosen)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(table.equals(tables[0]) for table in tables)
    # All rows once are 576,000 bytes, the tails of six files 400,000.
    assert data_requests(s3)[1] < 1_200_000
    check(in_bucket, reader, chosen)


def test_a_process_killed_while_writing_leaves_only_correct_rows(tmp_path):
    program = f"""
import importlib.util, numpy as np, pathlib
spec = importlib.util.spec_from_file_location("row_cache", {row_cache.__file__!r})
row_cache = importlib.util.module_from_spec(spec)  # without the package, which takes seconds
spec.loader.exec_module(row_cache)
dtype = np.dtype([("frames", np.float32, (6000,))])
cache = row_cache.RowCache(pathlib.Path({str(tmp_path)!r}), "a", dtype, limit=2**30)
ids = np.arange(1000, dtype=np.uint64)
content = np.zeros(1000, dtype)
content["frames"] = np.arange(1000)[:, None]
print("ready", flush=True)
while True:
    cache.store(ids, ids + np.uint64(1), content)
    for path in pathlib.Path({str(tmp_path)!r}).glob("*/*"):
        path.unlink()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout.readline()
    time.sleep(0.1 + random.random() / 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_cache, "FILE_BYTES", 2**23)
        dtype = np.dtype([("frames", np.float32, (6000,))])
        cache = RowCache(tmp_path, "a", dtype, limit=2**30)
        ids = np.arange(1000, dtype=np.uint64)
        content, is_present = cache.load(ids, ids + np.uint64(1))
        expected = np.repeat(ids[is_present, None], 6000, 1)
        np.testing.assert_array_equal(content["frames"][is_present], expected)
        stored = np.zeros(1000, dtype)
        stored["frames"] = np.arange(1000)[:, None]
        cache.store(ids, ids + np.uint64(1), stored)
        content, is_present = cache.load(ids, ids + np.uint64(1))
        assert is_present.all()
        np.testing.assert_array_equal(content["frames"], stored["frames"])
