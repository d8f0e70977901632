"""Tests of the funnel for every kind of head."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny

from xclip_jax.models import XClip, read_model_config
from xclip_jax.search.funnel import FURTHER, Funnel
from xclip_jax.search.selection import EVERYTHING, Selection
from xclip_jax.search.shard import Scorer, Shard, compare_frames
from xclip_jax.search.shards import LocalParts, Shards
from xclip_jax.search.store import Store
from xclip_jax.similarity import TextFeatures

DIM, FRAMES, WORDS, COUNT = 32, 4, 8, 300
HEADS = {
    "paper": {},
    "official": {"preset": "official"},
    "clip": {"head": "mean_pooling"},
    "lstm": {"head": "seq_lstm"},
    "tight": {"head": "tight_transformer"},
    "fusion": {"fusion": "transformer"},
    "frames only": {"granularities": ("frame_sentence", "frame_word")},
    "no words": {"granularities": ("video_sentence", "frame_sentence")},
}


def make_model(**fields):
    c = tiny.make_config("").model
    c.text.vocab_size = 100
    c.update(fields)
    model = XClip(read_model_config(c))
    return model, tiny.make_params(model)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """Returns segments of 20 topics. The frames of a segment are near each other."""
    rng = np.random.default_rng(0)
    topics = unit(rng.normal(size=(20, DIM)))
    frames = unit(
        topics[rng.integers(20, size=COUNT)][:, None] + 0.2 * rng.normal(size=(COUNT, FRAMES, DIM))
    )
    about = {"embed_dim": DIM, "max_frames": FRAMES, "precision": "float32", "model": ""}
    store = Store.create(tmp_path_factory.mktemp("index"), about)
    counts = rng.integers(1, FRAMES + 1, size=COUNT)
    rows = []
    for number, (block, count) in enumerate(zip(frames, counts, strict=True)):
        block[count:] = 0
        rows.append(
            {
                "id": f"{number:016x}",
                "path": f"/videos/{number % 7}.mp4",
                "size": 1,
                "mtime": 1,
                "start": float(number),
                "end": float(number + 1),
                "offset": 0.0,
                "count": count,
                "times": [0.0] * FRAMES,
                "video": unit(block[:count].sum(0)),
                "frames": block.reshape(-1),
                "thumbnail": b"",
            }
        )
    for start in range(0, COUNT, 100):  # three fragments
        store.add(rows[start : start + 100], [])
    return store.snapshot()


def open_shards(snapshot, model, params):
    return Shards(LocalParts(Shard(snapshot, Scorer(model, params))))


def rank(snapshot, funnel, text, depth, *, selection=EVERYTHING, **options):
    shards = open_shards(snapshot, funnel.scorer.model, funnel.scorer.params)
    ranking = funnel.rank(shards, selection, text, depth, **options)
    return with_rows(snapshot, ranking)


def rank_exhaustively(snapshot, funnel, text, depth, *, selection=EVERYTHING):
    shards = open_shards(snapshot, funnel.scorer.model, funnel.scorer.params)
    (ranking,) = funnel.rank_exhaustively(shards, selection, text, depth)
    return with_rows(snapshot, ranking)


def with_rows(snapshot, ranking):
    """Returns a ranking with the numbers of segments in place of row ids."""
    return dataclasses.replace(ranking, rows=snapshot.find_row_ids(ranking.rows))


def make_funnel(model, params, **widths):
    return Funnel(Scorer(model, params), **widths)


def rows_of(ranking, k=10):
    """Returns the best k rows."""
    return ranking.rows[:k].tolist()


def make_text(seed=0):
    rng = np.random.default_rng(seed)
    words = unit(rng.normal(size=(1, WORDS, DIM)))
    return TextFeatures(words[:, 5], words, np.arange(WORDS)[None] < 6)


def score_all(snapshot, model, params, text):
    video = snapshot.features(np.arange(COUNT))
    return np.asarray(tiny.apply(model, params, text, video, method="similarity"))[0]


@pytest.mark.parametrize("head", HEADS)
def test_funnel_as_wide_as_the_index_equals_exhaustive_search(snapshot, head):
    model, params = make_model(**HEADS[head])
    for seed in range(3):
        text = make_text(seed)
        scores = score_all(snapshot, model, params, text)
        expected = np.argsort(-scores, kind="stable")[:10]
        funnel = make_funnel(model, params, candidates=COUNT, rerank=COUNT)
        for ranking in (
            rank(snapshot, funnel, text, 10),
            rank_exhaustively(snapshot, funnel, text, 10),
        ):
            rows, found_scores = rows_of(ranking), ranking.scores[:10]
            np.testing.assert_allclose(found_scores, scores[expected], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(scores[rows], scores[expected], rtol=1e-4, atol=1e-5)


def test_each_stage_passes_on_its_best_scores(snapshot):
    model, params = make_model()
    text = make_text()
    video = snapshot.features(np.arange(COUNT))
    parts = tiny.apply(model, params, text, video, method="granular_similarity")
    parts = {name: np.asarray(value)[0] for name, value in parts.items()}
    first = np.argsort(-parts["video_sentence"])[:50]
    words = parts["video_sentence"] + parts["video_word"]
    second = first[np.argsort(-words[first])][:16]
    total = sum(parts.values()) / 4
    third = second[np.argsort(-total[second])]
    answer = rank(snapshot, make_funnel(model, params, candidates=50, rerank=16), text, 16)
    assert rows_of(answer, 16) == third.tolist()
    np.testing.assert_allclose(answer.scores, total[third], atol=1e-4)
    assert list(answer.seconds) == ["sentence-video", "video-word", "all"]


def test_model_without_word_granularity_skips_the_word_stage(snapshot):
    model, params = make_model(head="mean_pooling")
    text = make_text()
    funnel = make_funnel(model, params, candidates=7, rerank=20)
    scores = score_all(snapshot, model, params, text)
    assert rows_of(rank(snapshot, funnel, text, 20), 20) == np.argsort(-scores)[:20].tolist()


def test_only_allowed_rows_are_returned(snapshot):
    model, params = make_model()
    text, allowed = make_text(), np.arange(COUNT) % 3 == 1
    scores = np.where(allowed, score_all(snapshot, model, params, text), -np.inf)
    funnel = make_funnel(model, params)
    expected = np.argsort(-scores)[:10].tolist()
    third = {"selection": Selection(only=snapshot.row_ids[allowed])}
    assert rows_of(rank(snapshot, funnel, text, 10, **third)) == expected
    assert rows_of(rank_exhaustively(snapshot, funnel, text, 10, **third)) == expected
    others = {"selection": Selection(without=snapshot.row_ids[~allowed])}
    assert rows_of(rank(snapshot, funnel, text, 10, **others)) == expected
    few = {"selection": Selection(only=snapshot.row_ids[:3])}
    assert sorted(rows_of(rank(snapshot, funnel, text, 10, **few))) == [0, 1, 2]


def test_further_rows_are_scored_like_the_others(snapshot):
    model, params = make_model()
    text = make_text()
    scores = score_all(snapshot, model, params, text)
    funnel = make_funnel(model, params, candidates=50, rerank=16)
    plain = rank(snapshot, funnel, text, 16)
    best, worst = plain.rows[3], int(scores.argmin())
    ranking = rank(snapshot, funnel, text, 16, further=snapshot.row_ids[[best, worst]])
    assert ranking.blocks.tolist() == [0] * 16 + [FURTHER]
    assert ranking.rows.tolist() == [*plain.rows.tolist(), worst]
    np.testing.assert_allclose(ranking.scores, scores[ranking.rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["paper", "clip"])
def test_longer_ranking_begins_with_the_shorter_one(snapshot, head):
    model, params = make_model(**HEADS[head])
    text = make_text()
    scores = score_all(snapshot, model, params, text)
    funnel = make_funnel(model, params, candidates=200, rerank=16)
    rankings = [rank(snapshot, funnel, text, depth) for depth in (10, 16, 17, 33, 120, 10_000)]
    assert [len(ranking.rows) for ranking in rankings] == [16, 16, 32, 64, 128, COUNT]
    for shorter, longer in itertools.pairwise(rankings):
        assert rows_of(longer, len(shorter.rows)) == rows_of(shorter, 1000)
    assert np.bincount(rankings[-1].blocks).tolist() == [16, 16, 32, 64, 128, 44]
    for block in range(6):
        values = scores[rankings[-1].rows[rankings[-1].blocks == block]]
        assert (np.diff(values) <= 1e-5).all()


@pytest.mark.parametrize("head", ["paper", "clip", "official", "tight"])
def test_frames_are_compared_by_cosine(snapshot, head):
    model, params = make_model(**HEADS[head])
    text, video = make_text(), snapshot.features(np.arange(5))
    cosines = compare_frames(text.replace(sentence=3 * text.sentence), video)
    np.testing.assert_allclose(cosines, video.frames @ text.sentence[0], atol=1e-6)
    ranking = rank(snapshot, make_funnel(model, params), text, 5)
    row = int(ranking.rows[0])
    curve = snapshot.features(np.array([row])).frames[0] @ text.sentence[0]
    count = int(ranking.mask_nxF[0].sum())
    smoothed = np.convolve(curve[:count], [1, 2, 1], "same")
    smoothed /= np.convolve(np.ones(count), [1, 2, 1], "same")
    np.testing.assert_allclose(ranking.similarities_nxF[0, :count], smoothed, atol=1e-5)


@pytest.mark.parametrize("head", ["paper", "clip", "tight"])
def test_example_is_compared_with_videos_and_frames(snapshot, head):
    model, params = make_model(**HEADS[head])
    every = snapshot.features(np.arange(COUNT))
    vector = every.video[42]
    cosines = np.where(every.mask, every.frames @ vector, -np.inf)
    weights = np.exp((cosines - cosines.max(1, keepdims=True)) / 0.01)
    attended = np.sum(weights * (every.frames @ vector), 1) / weights.sum(1)  # Eq. 7, 8
    scores = np.exp(params["clip"]["logit_scale"]) * (every.video @ vector + attended) / 2
    funnel = make_funnel(model, params, rerank=COUNT)
    shards, query = (
        open_shards(snapshot, model, params),
        funnel.scorer.make_example(5 * vector[None]),
    )
    ranking = with_rows(snapshot, funnel.of_examples().rank(shards, EVERYTHING, query, 10))
    expected = np.argsort(-scores)[:10]
    np.testing.assert_allclose(ranking.scores[:10], scores[expected], rtol=1e-4)
    np.testing.assert_allclose(scores[rows_of(ranking)], scores[expected], rtol=1e-4)


def test_rows_are_read_in_the_requested_order(snapshot):
    rows = np.array([250, 3, 101, 299, 0])
    table = snapshot.read(rows, ["id", "start"])
    assert table["start"].to_pylist() == rows.tolist()
    assert [snapshot.find(key) for key in table["id"].to_pylist()] == rows.tolist()
    every = snapshot.features(np.arange(COUNT))
    some = jax.tree.map(lambda x: x[rows], every)
    jax.tree.map(np.testing.assert_array_equal, snapshot.features(rows), some)
