"""Tests of an index in parts: the ranking of one part, and what is merged of several."""

import dataclasses

import numpy as np
import pytest
from funnel_test import COUNT, HEADS, make_funnel, make_model, make_text, open_shards, snapshot

from xclip_jax.search import row_ids
from xclip_jax.search.answers import Request
from xclip_jax.search.passages import Passages
from xclip_jax.search.querying import Query, run_query
from xclip_jax.search.row_ids import Part
from xclip_jax.search.selection import EVERYTHING, Selection
from xclip_jax.search.shard import Scorer, Shard
from xclip_jax.search.shards import LostError, Parts, Shards
from xclip_jax.search.snapshot import Snapshot

__all__ = ["snapshot"]  # a fixture


class ParallelParts(Parts):
    """Parts in this process. Those whose numbers are in `silent` do not answer."""

    def __init__(self, shards, silent=()):
        self.shards, self.count, self.silent = shards, len(shards), set(silent)

    def ask(self, method, arguments):
        if lost := self.silent & set(arguments):
            raise LostError(lost)
        return {n: getattr(self.shards[n], method)(*some) for n, some in arguments.items()}


@pytest.fixture(autouse=True)
def small_shares(monkeypatch):
    monkeypatch.setattr(row_ids, "_SHARED_ROWS", 16)


def split(snapshot, count, model, params):
    """Returns the parts of an index."""
    source = snapshot._location, snapshot._about, snapshot._table
    snapshots = [Snapshot(*source, Part(number, count)) for number in range(count)]
    assert sum(map(len, snapshots)) == COUNT
    assert min(map(len, snapshots)) >= COUNT / count / 2
    return [Shard(one, Scorer(model, params)) for one in snapshots]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("head", ["paper", "clip", "official", "tight"])
def test_parts_have_the_ranking_of_the_whole(snapshot, head, count):
    model, params = make_model(**HEADS[head])
    whole = open_shards(snapshot, model, params)
    parts = Shards(ParallelParts(split(snapshot, count, model, params)))
    funnel = make_funnel(model, params, candidates=100, rerank=32)
    for seed in range(25):
        rng, text = np.random.default_rng(seed), make_text(seed)
        selection = Selection(path=[None, "3.mp4"][seed % 2], start=[None, 50.0][seed % 2])
        further = snapshot.row_ids[rng.integers(COUNT, size=3)]
        rankings = [
            funnel.rank(shards, selection, text, 40, further=further) for shards in (whole, parts)
        ]
        fields = [dataclasses.replace(ranking, seconds={}) for ranking in rankings]
        for name, value in vars(fields[0]).items():
            if name == "segments":
                check_segments(value, fields[1].segments)
            else:  # to the last bit
                np.testing.assert_array_equal(value, getattr(fields[1], name), err_msg=name)


@pytest.mark.parametrize("head", ["paper", "clip", "official", "tight"])
def test_selection_without_a_segment_has_an_empty_ranking(snapshot, head):
    model, params = make_model(**HEADS[head])
    funnel, nowhere = make_funnel(model, params), Selection(path="nowhere")
    parts = Shards(ParallelParts(split(snapshot, 2, model, params)))
    for shards in (open_shards(snapshot, model, params), parts):
        rankings = [
            funnel.rank(shards, nowhere, make_text(), 10),
            *funnel.rank_exhaustively(shards, nowhere, make_text(), 10),
        ]
        for ranking in rankings:
            assert (len(ranking.rows), len(ranking.segments.ids), ranking.searched) == (0, 0, 0)


def test_query_asks_the_parts_four_times(snapshot, tmp_path):
    model, params = make_model()
    parts, asked = ParallelParts(split(snapshot, 2, model, params)), []
    answer = parts.ask
    parts.ask = lambda method, arguments: asked.append(method) or answer(method, arguments)
    query = Query(make_funnel(model, params, candidates=100, rerank=32), make_text())
    passages = Passages(str(tmp_path))  # none
    hits = run_query(query, Shards(parts), EVERYTHING, Request(3), passages)
    assert asked == ["nearest", "score_words", "score", "durations"]
    assert hits.searched == COUNT


def check_segments(segments, others):
    for field in dataclasses.fields(segments):
        one, other = (getattr(some, field.name) for some in (segments, others))
        np.testing.assert_array_equal(one, other, err_msg=field.name)


def test_parts_are_scored_exhaustively_like_the_whole(snapshot):
    model, params = make_model()
    whole = open_shards(snapshot, model, params)
    parts = Shards(ParallelParts(split(snapshot, 3, model, params)))
    funnel = make_funnel(model, params, rerank=16)
    for text in map(make_text, range(3)):
        (one,), (other,) = (
            funnel.rank_exhaustively(shards, EVERYTHING, text, 20) for shards in (whole, parts)
        )
        assert one.rows.tolist() == other.rows.tolist()
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_facts_are_merged_in_the_order_of_the_rows(snapshot):
    model, params = make_model()
    whole = open_shards(snapshot, model, params)
    parts = Shards(ParallelParts(split(snapshot, 3, model, params)))
    rows = np.random.default_rng(0).permutation(snapshot.row_ids)
    one, other = whole.segments(rows), parts.segments(rows)
    check_segments(one, other)
    assert other.durations.min() > 290  # every film goes on in other parts
    ids = one.ids[:50]
    assert parts.rows_of(ids) == whole.rows_of(ids) == dict(zip(ids, rows.tolist(), strict=False))
    films = [shards.films().sort_by("path").to_pylist() for shards in (whole, parts)]
    assert films[0] == films[1]
    assert len(films[0]) == 7
    np.testing.assert_array_equal(whole.features(rows[:1]).frames, parts.features(rows[:1]).frames)
    with pytest.raises(KeyError):
        parts.find("f" * 16)


def test_lost_parts_are_left_out(snapshot):
    model, params = make_model()
    shards = split(snapshot, 3, model, params)
    funnel, text = make_funnel(model, params, candidates=100, rerank=32), make_text()
    with pytest.raises(LostError) as raised:
        funnel.rank(Shards(ParallelParts(shards, silent=[1])), EVERYTHING, text, 10)
    assert raised.value.numbers == {1}
    without = Shards(ParallelParts(shards, silent=[1]), raised.value.numbers)
    ranking = funnel.rank(without, EVERYTHING, text, 10)
    assert ranking.searched == COUNT - len(shards[1].snapshot)
    assert not np.isin(ranking.rows, shards[1].snapshot.row_ids).any()
    assert without.segments(ranking.rows).ids


def test_equal_scores_are_in_the_order_of_rows(snapshot):
    model, params = make_model()
    vector = snapshot.vectors.take(np.array([7])).astype(np.float32)
    rows, products = snapshot.nearest(0 * vector, 10, subtract_bias=False)
    assert rows.tolist() == list(range(10))
    assert not products.any()
    parts = Shards(ParallelParts(split(snapshot, 4, model, params)))
    nearest = parts.nearest(EVERYTHING, 0 * vector, 10, by_example=False)
    assert nearest.rows.tolist() == snapshot.row_ids[:10].tolist()
