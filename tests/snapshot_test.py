"""Tests of versions of an index: a later one reads only what is new."""

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from funnel_test import DIM, FRAMES, unit

from xclip_jax.search import repeats
from xclip_jax.search.digests import PARTS, add_digests
from xclip_jax.search.repeats import repeated_rows
from xclip_jax.search.row_ids import to_keys
from xclip_jax.search.selection import EVERYTHING, Selection
from xclip_jax.search.snapshot import Snapshot
from xclip_jax.search.store import Store
from xclip_jax.search.vectors import Vectors

COUNT = 200


def make_row(number):
    rng = np.random.default_rng(number)
    frames = unit(rng.normal(size=(FRAMES, DIM)))
    return {
        "id": f"{(number * 7919) % 10007:016x}",
        "path": f"/videos/{number // 10}.mp4",
        "size": 1,
        "mtime": number // 10,
        "start": float(number % 10),
        "end": float(number % 10 + 1),
        "offset": 0.0,
        "count": FRAMES - number % 2,
        "times": [0.0, 0.25, 0.5, 0.75],
        "video": unit(frames.sum(0)),
        "frames": frames.reshape(-1),
        "thumbnail": b"",
    }


@pytest.fixture
def store(tmp_path):
    about = {"embed_dim": DIM, "max_frames": FRAMES, "precision": "float32", "model": ""}
    store = Store.create(tmp_path / "index", about)
    store.add([make_row(number) for number in range(COUNT)], [])
    return store


@pytest.fixture
def num_read(monkeypatch):
    """Counts the rows whose vectors are read, in a list with one number for each snapshot."""
    counts, read = [], Snapshot._read_batches

    def count(self, row_ids, **options):
        counts.append(0)
        for batch in read(self, row_ids, **options):
            counts[-1] += len(batch)
            yield batch

    monkeypatch.setattr(Snapshot, "_read_batches", count)
    return counts


def facts(snapshot):
    """Returns what a snapshot holds, by row id."""
    row_ids, rows = snapshot._sorted_row_ids
    table = snapshot.rows.take(rows)
    video = snapshot.features(rows)
    return {
        "row_ids": row_ids.tolist(),
        "keys": snapshot.keys[rows].tolist(),
        "rows": table.to_pylist(),
        "vectors": snapshot.vectors.take(rows).tolist(),
        "frames": np.asarray(video.frames).tolist(),
        "mask": np.asarray(video.mask).tolist(),
        "films": sorted(snapshot.films.to_pylist(), key=str),
        "masks": [int(np.sum(snapshot.mask(Selection(path="/1?.mp4", start=3.5)))), len(snapshot)],
        "nearest": snapshot.row_ids[
            snapshot.nearest(np.ones((1, DIM), np.float32), 30, subtract_bias=False)[0]
        ].tolist(),
    }


def table_of(store):
    return lancedb.connect(store.location).open_table("segments")


def test_later_version_reads_only_new_rows(store, num_read):
    first = store.snapshot()
    store.add([make_row(number) for number in range(COUNT, COUNT + 15)], [])
    second = store.snapshot(former=first)
    assert num_read == [COUNT, 15]
    assert second.vectors._blocks[0] is first.vectors._blocks[0]  # not a copy
    assert facts(second) == facts(store.snapshot())
    assert len(first) == COUNT  # still as it was
    assert facts(store.snapshot(former=second)) == facts(second)
    assert num_read[3:] == []  # nothing was new


def test_deleted_and_compacted_rows_are_followed(store, num_read):
    first = store.snapshot()
    store.remove({"/videos/3.mp4": None})
    table_of(store).optimize()  # gives all rows other ids
    store.add([make_row(number) for number in range(COUNT, COUNT + 5)], [])
    second = store.snapshot(former=first)
    assert num_read == [COUNT, 5]
    assert facts(second) == facts(store.snapshot())
    assert len(second) == COUNT - 5
    assert second.rows_of([make_row(35)["id"]]) == {}
    store.add([make_row(number) for number in range(30, 40)], [])  # comes back
    third = store.snapshot(former=second)
    assert num_read[-1] == 10
    assert facts(third) == facts(store.snapshot())


def test_version_without_many_former_rows_is_read_anew(store, num_read):
    first = store.snapshot()
    store.remove({f"/videos/{film}.mp4": None for film in range(3)})
    second = store.snapshot(former=first)
    assert num_read == [COUNT, COUNT - 30]
    assert len(second.row_ids) == COUNT - 30  # no dead ones
    assert facts(second) == facts(store.snapshot())


def test_repeated_rows_count_once(store, num_read):
    first = store.snapshot()
    table = table_of(store)
    again = table.to_arrow().slice(5, 3)
    table.add(again)
    assert len(repeated_rows(table)) == 3
    second = store.snapshot(former=first)
    assert len(second) == COUNT
    assert num_read == [COUNT]
    store.compact()
    assert table_of(store).count_rows() == COUNT
    assert facts(store.snapshot(former=second)) == facts(store.snapshot())


def test_segment_of_the_same_id_and_other_content_is_read(store, num_read):
    """A file that is removed and added again by another kind of device has other features."""
    first = store.snapshot()
    store.remove({"/videos/3.mp4": None})
    others = [
        make_row(number) | {"video": make_row(500 + number)["video"]} for number in range(30, 40)
    ]
    store.add(others, [])
    second = store.snapshot(former=first)
    assert num_read == [COUNT, 10]
    assert facts(second) == facts(store.snapshot())


def test_corrupted_segments_are_left_out_and_read_once(store, num_read, caplog):
    rows = add_digests(
        store._to_table([make_row(number) for number in range(COUNT, COUNT + 3)]).drop_columns(
            list(PARTS)
        )
    )
    place = rows.column_names.index("digest")
    table_of(store).add(rows.set_column(place, "digest", pa.array([1, 2, 3], pa.int64())))
    first = store.snapshot()
    assert (len(first), first.corrupted) == (COUNT, {"/videos/20.mp4"})
    store.add([make_row(number) for number in range(300, 304)], [])
    second = store.snapshot(former=first)
    assert num_read == [COUNT + 3, 4]
    assert second.corrupted == first.corrupted
    assert len(caplog.records) == 1
    store.remove({"/videos/20.mp4": None})
    assert store.snapshot(former=second).corrupted == set()


def test_many_equal_similarities_are_in_the_order_of_rows(store):
    copies = [make_row(number) | {"video": make_row(0)["video"]} for number in range(1000, 1300)]
    store.add(copies, [])
    first = store.snapshot()
    store.remove({"/videos/105.mp4": None, "/videos/106.mp4": None})
    store.add(copies[50:70], [])  # now the last rows of the table, in the middle of the memory
    for snapshot in (store.snapshot(former=first), store.snapshot()):
        query = make_row(0)["video"][None].astype(np.float32)
        rows, products = snapshot.nearest(query, 100, subtract_bias=False)
        assert len(set(products.tolist())) == 1
        equal = np.sort(
            snapshot.row_ids[
                snapshot.find_keys(to_keys(pa.array([row["id"] for row in [make_row(0), *copies]])))
            ]
        )
        assert snapshot.row_ids[rows].tolist() == equal[:100].tolist()


def test_repeated_row_that_was_pruned_meanwhile_does_not_come_back(store, monkeypatch):
    table = table_of(store)
    table.add(table.to_arrow().slice(5, 3))
    find = repeats.repeated_rows

    def find_and_prune(*arguments):
        found = find(*arguments)
        store.remove({"/videos/9.mp4": None})
        return found

    monkeypatch.setattr(repeats, "repeated_rows", find_and_prune)
    repeats.delete_repeated_rows(table)
    assert table_of(store).count_rows() == COUNT - 10


def test_small_blocks_of_vectors_are_merged():
    rng = np.random.default_rng(0)
    parts = [unit(rng.normal(size=(size, DIM))) for size in (100, 3, 2, 60, 5, 5, 5)]
    vectors, sizes = Vectors(DIM, has_biases=False), []
    for part in parts:
        vectors = vectors.extended([(part, np.zeros(len(part)))], len(part))
        sizes.append([block.ntotal for block in vectors._blocks])
    assert sizes == [[100], [100, 3], [100, 5], [165], [165, 5], [165, 10], [165, 15]]
    every = np.concatenate(parts)
    np.testing.assert_array_equal(vectors.take(np.arange(180)), every.astype(np.float16))
    products, rows = vectors.search(every[170:171], 8, None, subtract_bias=False)
    best = rows[np.argsort(-products)][:8]
    assert best.tolist() == np.argsort(-(every @ every[170]))[:8].tolist()


def test_ids_are_converted_to_numbers():
    table = pa.table({"id": ["00000000000000ff", "ffffffffffffffff"]})
    assert to_keys(table["id"]).tolist() == [255, 2**64 - 1]
    damaged = pa.table({"id": ["00000000000000ff", "00000000000000fg", ""]})
    assert to_keys(damaged["id"])[0] == 255
    assert len(to_keys(damaged["id"])) == 3


def test_everything_selects_all_rows(store):
    snapshot = store.snapshot()
    assert snapshot.mask(EVERYTHING) is None
    assert EVERYTHING.is_everything
    assert not Selection(end=3.0).is_everything
