"""Tests of indexing by the shards of a job array, and by several processes at the same time."""

import contextlib
import os
import threading
from pathlib import Path

import pytest
import tiny
from filelock import FileLock
from index_adding import bucket, copies, in_thread, run_together, stored_rows
from indexes import COUNT, SECONDS, content, copied, made, model, no_processes, videos
from s3 import s3

from xclip_jax.search import Index, indexing, repeats, store
from xclip_jax.search.__main__ import main
from xclip_jax.search.job_array import ArrayShard, BusyError, lock_files
from xclip_jax.search.passages import Passages
from xclip_jax.search.store import ExistsError, Store

pytest.importorskip("lance", reason="pylance is not installed")
__all__ = ["bucket", "copied", "in_thread", "made", "model", "no_processes", "s3", "videos"]


def test_every_file_is_in_one_shard():
    paths = [f"/videos/{n}.mp4" for n in range(1000)]
    shards = [ArrayShard.parse(f"{n}/4") for n in range(4)]
    parts = [[path for path in paths if path in shard] for shard in shards]
    assert sorted(path for part in parts for path in part) == sorted(paths)
    assert min(map(len, parts)) > 200
    assert all(path in ArrayShard() for path in paths)


def test_shards_are_written_at_the_same_time_and_alone_otherwise(tmp_path):
    location = str(tmp_path)
    busy = pytest.raises(BusyError, match="another process is adding")
    with lock_files(location, ArrayShard(0, 4)), lock_files(location, ArrayShard(1, 4)):
        for other in (ArrayShard(), ArrayShard(0, 4), ArrayShard(2, 3), ArrayShard(0, 14)):
            with busy, lock_files(location, other):
                pass
    with lock_files(location, ArrayShard()):
        for other in (ArrayShard(), ArrayShard(0, 4)):
            with busy, lock_files(location, other):
                pass
    for shard in (ArrayShard(2, 3), ArrayShard(), ArrayShard(0, 4)):
        with lock_files(location, shard):
            pass


def test_second_run_on_a_folder_is_busy(copied, videos, in_thread):
    with FileLock(Path(copied.location, "writer.lock")), pytest.raises(BusyError):
        copied.add(videos, workers="local:2")
    with FileLock(Path(copied.location, "writer-1-of-2.lock")), pytest.raises(BusyError):
        copied.add(videos)


@pytest.mark.parametrize("is_bucket", [False, True])
def test_shards_together_add_every_file_once(
    bucket, copied, model, videos, tmp_path, is_bucket, monkeypatch
):
    monkeypatch.setattr(indexing, "MIN_COMMIT_SECONDS", 0)
    monkeypatch.setattr(indexing, "COMMIT_FRACTION", 0)
    folder = copies(videos, tmp_path / "videos", 12)
    (folder / "broken.mp4").write_bytes(b"nothing")
    for number in range(12):
        srt = folder / f"{number}.srt"
        srt.write_text(f"1\n00:00:00,000 --> 00:00:02,000\nline {number}\n")
    location = bucket.location if is_bucket else copied.location
    before = stored_rows(location)
    barrier = threading.Barrier(3)

    def add(number):
        index = Index.open(location)
        barrier.wait()
        return index.add(folder, shard=f"{number}/3")

    parts = run_together(*(lambda n=n: add(n) for n in range(3)))
    assert sum(part.files for part in parts) == 12
    assert sum(part.texts for part in parts) == 12
    assert [len(part.unreadable) for part in parts].count(1) == 1
    assert stored_rows(location) == before + 36
    index = Index.open(location)
    assert index.num_segments == before + 36
    again = index.add(folder)
    assert (again.files, again.unchanged, again.texts) == (0, 12, 0)
    assert len(Passages(location).files("subtitles")) >= 12


def test_shard_prunes_its_own_files(copied, videos, tmp_path):
    folder = copies(videos, tmp_path / "videos", 12)
    copied.add(folder)
    for number in range(11):
        (folder / f"{number}.mp4").unlink()
    removed = [copied.add(folder, prune=True, shard=f"{n}/2").removed for n in range(2)]
    assert sum(removed) == 11
    assert min(removed) > 0


@pytest.mark.parametrize("spec", [None, "local:2"])
def test_same_files_added_twice_at_a_time_to_a_bucket_count_once(
    bucket, model, videos, spec, in_thread, monkeypatch, tmp_path
):
    barrier = threading.Barrier(2, timeout=60)
    name = "append" if spec else "add"
    commit, location = getattr(Store, name), bucket.location
    counts = []

    def commit_together(store, *rows):
        barrier.wait()  # both have found that the files are new
        commit(store, *rows)
        barrier.wait()
        counts.append((stored_rows(location), len(Index.open(location))))
        barrier.wait()

    monkeypatch.setattr(Store, name, commit_together)
    parts = run_together(*[lambda: Index.open(location).add(videos, workers=spec)] * 2)
    assert [part.segments for part in parts] == [3 * COUNT] * 2
    if spec:
        assert counts == [(6 * COUNT, 3 * COUNT)] * 2
    assert stored_rows(location) == len(Index.open(location)) == 3 * COUNT
    alone = Index.create(tmp_path / "alone", model, segment_seconds=SECONDS)
    monkeypatch.undo()
    monkeypatch.setattr(indexing, "run_jobs", tiny.run_jobs_here)
    alone.add(videos)
    assert content(Index.open(location)) == content(alone)


def test_workers_and_shards_add_to_an_s3_bucket(model, videos, s3, in_thread):
    location = f"{s3.uri}/index"
    Index.create(location, model, segment_seconds=SECONDS)
    options = [{"shard": "0/2"}, {"shard": "1/2", "workers": "local:1"}, {}]
    run_together(*(lambda o=o: Index.open(location).add(videos, **o) for o in options))
    index = Index.open(location)
    assert index.add(videos).unchanged == COUNT
    assert stored_rows(location) == len(index) == 3 * COUNT


@pytest.mark.parametrize("is_bucket", [False, True])
def test_one_of_several_processes_creates_an_index(tmp_path, is_bucket):
    location = f"file://{tmp_path}/index" if is_bucket else str(tmp_path / "index")
    about = {"max_frames": 2, "embed_dim": 4, "precision": "float32"}
    barrier = threading.Barrier(8)

    def create():
        barrier.wait()
        with contextlib.suppress(ExistsError):
            return Store.create(location, about)

    stores = run_together(*[create] * 8)
    created = sum(one is not None for one in stores)
    # A bucket may let two of them write the same empty tables.
    assert created >= 1 if is_bucket else created == 1
    assert Store(location).files() == {}
    assert os.listdir(tmp_path) == ["index"]


def test_conflict_while_an_index_is_created_is_tried_again(tmp_path, monkeypatch):
    create, errors = Passages.create, iter([RuntimeError("Retryable commit conflict")])

    def fail_once(self):
        for error in errors:
            raise error
        create(self)

    monkeypatch.setattr(Passages, "create", fail_once)
    about = {"max_frames": 2, "embed_dim": 4, "precision": "float32"}
    assert Store.create(f"file://{tmp_path}/index", about).files() == {}


def test_command_adds_to_an_index_that_another_process_has_just_created(
    copied, model, videos, monkeypatch, capsys
):
    exists = iter([False])
    monkeypatch.setattr("xclip_jax.search.__main__.exists", lambda location: next(exists))
    command = ["index", str(videos), f"--index={copied.location}", f"--model={model}"]
    main(command)
    assert f"{3 * COUNT} segments of {COUNT} files" in capsys.readouterr().out
    exists = iter([False])
    with pytest.raises(SystemExit, match=r"--segment_seconds=3: .* was made with 2"):
        main([*command, "--segment_seconds=3"])


def test_rows_are_kept_if_two_processes_delete_each_others_copies(copied, monkeypatch):
    table = Store(copied.location)._segments
    rows = table.to_arrow()
    table.add(rows)
    before = content(copied)
    find = repeats.repeated_rows

    def find_and_wait(table, names):
        repeated = find(table, names)
        other = Store(copied.location)._segments  # which deletes the first copies
        ids = other.search().select(["id"]).with_row_id(True).to_arrow()["_rowid"].to_pylist()
        others = set(ids) - set(repeated.to_pylist())
        other.delete(f"_rowid IN ({', '.join(map(str, others))})")
        return repeated

    monkeypatch.setattr(repeats, "repeated_rows", find_and_wait)
    Store(copied.location).compact()
    monkeypatch.undo()
    assert stored_rows(copied.location) == 3 * COUNT
    assert content(Index.open(copied.location)) == before


def test_conflicting_commit_is_repeated(monkeypatch):
    monkeypatch.setattr(store.random, "uniform", lambda low, high: 0)
    attempts = []

    def conflict():
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("conflict")

    store.retry_commit(conflict)
    assert len(attempts) == 3
    attempts.clear()
    monkeypatch.setattr(store, "MAX_COMMITS", 2)
    with pytest.raises(OSError, match="conflict"):
        store.retry_commit(conflict)
