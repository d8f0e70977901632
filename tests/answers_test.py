"""Tests of answers: fusion of sources, merged moments, folded near-duplicates, weak marks."""

import numpy as np
import pytest

from xclip_jax.search.answers import RANK_CONSTANT, Request, fuse_ranks, make_answer
from xclip_jax.search.funnel import FURTHER, Ranking
from xclip_jax.search.passages import Passage
from xclip_jax.search.results import Match
from xclip_jax.search.shard import Segments

SECONDS = 10.0  # of a segment, with a frame every second


def segments_of(paths, vectors=None):
    """Returns segments of films: row r is the r-th of all, `paths` has the film of each."""
    counts = [paths[:row].count(path) for row, path in enumerate(paths)]
    starts = SECONDS * np.array(counts, float)
    return Segments(
        rows=np.arange(len(paths)),
        ids=[str(row) for row in range(len(paths))],
        paths=paths,
        starts=starts,
        ends=starts + SECONDS,
        offsets=np.zeros(len(paths)),
        durations=np.full(len(paths), 99.0),
        times_nxF=starts[:, None] + np.arange(SECONDS),
        vectors_nxD=np.eye(len(paths)) if vectors is None else np.array(vectors),
    )


def ranking_of(rows, *, peaks=None, biases=None, further=(), blocks=None):
    """Returns a ranking of rows with the scores 20, 19, ..., each similar at its peak only."""
    rows = np.array(rows)
    curves = np.zeros((len(rows), int(SECONDS)))
    for curve, peak in zip(curves, peaks or [5] * len(rows), strict=True):
        curve[peak] = 1.0
    scores = 20.0 - np.arange(len(rows))
    biases = np.zeros(len(rows)) if biases is None else np.array(biases)
    shape = np.ones_like(curves, bool)
    if blocks is None:
        blocks = [FURTHER if row in further else 0 for row in rows]
    segments = segments_of([])
    return Ranking(rows, segments, np.array(blocks), scores, biases, curves, shape, {}, 7)


def passage(row, source="speech", start=1.0):
    return Passage(str(row), Match(source, 3.0, start, start + 2, f"said {row}"))


def ids(answer):
    return [int(hit.id) for hit in answer]


def test_reciprocal_ranks_are_added():
    fused = fuse_ranks([[4, 5, 6], [6, 9]])
    scores = {4: 1 / 61, 5: 1 / 62, 6: 1 / 63 + 1 / 61, 9: 1 / 62}
    assert RANK_CONSTANT == 60
    assert fused == sorted(scores, key=lambda item: -scores[item])
    assert fuse_ranks([[3, 1, 2]]) == [3, 1, 2]


def test_pictures_alone_keep_their_ranking():
    paths = [f"{n}.mp4" for n in range(4)]
    answer = make_answer(segments_of(paths), ranking_of([2, 0, 3, 1]), [], Request(10))
    assert ids(answer) == [2, 0, 3, 1]
    assert [hit.rank for hit in answer] == [1, 2, 3, 4]
    assert (answer[0].start, answer[0].end, answer[0].second) == (4.5, 5.5, 5.0)
    assert [match.source for match in answer[0].matches] == ["picture"]
    assert answer.searched == 7


def test_segment_found_by_two_sources_comes_first():
    paths = [f"{n}.mp4" for n in range(4)]
    ranking = ranking_of([2, 0, 3, 1], further=[1])
    answer = make_answer(segments_of(paths), ranking, [passage(3), passage(1)], Request(10))
    # 3: 1 / 63 + 1 / 61; 2: 1 / 61; 0: 1 / 62; 1 has no rank by pictures: 1 / 62.
    assert ids(answer) == [3, 2, 0, 1]
    best = answer[0]
    assert [match.source for match in best.matches] == ["speech", "picture"]
    assert (best.start, best.end, best.second) == (1.0, 3.0, 1.0)  # of the better source
    assert best.score == 18.0


def test_without_pictures_there_is_no_score():
    passages = [passage(1), passage(0, "text")]
    answer = make_answer(segments_of(["0.mp4", "1.mp4"]), None, passages, Request(10))
    assert ids(answer) == [1, 0]
    assert [hit.score for hit in answer] == [None, None]
    assert [hit.matches[0].source for hit in answer] == ["speech", "text"]


def test_neighbours_are_merged_into_one_moment():
    segments = segments_of(["a.mp4", "a.mp4", "a.mp4"])
    ranking = ranking_of([0, 1, 2], peaks=[9, 0, 5])
    answer = make_answer(segments, ranking, [], Request(10))
    assert [(hit.id, hit.start, hit.end) for hit in answer] == [("0", 8.5, 10.5), ("2", 24.5, 25.5)]
    assert len(make_answer(segments, ranking, [], Request(10, merge=False))) == 3


def test_worse_moment_ends_where_a_better_one_begins():
    segments = segments_of(["a.mp4"] * 3)
    ranking = ranking_of([1, 0], peaks=[2, 2])
    ranking.similarities_nxF[1] = 0.5  # from 0 to 10 s, with its peak at 2 s
    ranking.similarities_nxF[1, 2] = 0.6
    ranking.similarities_nxF[0, :2] = 0.4
    answer = make_answer(segments, ranking, [], Request(10, background=-0.5))
    assert [(hit.start, hit.end, hit.second) for hit in answer] == [
        (11.5, 12.5, 12.0),
        (0.0, 11.5, 2.0),
    ]
    assert answer[1].matches[0].end == 11.5


def test_pages_continue_each_other():
    paths = [f"{n}.mp4" for n in range(9)]
    segments, ranking = segments_of(paths), ranking_of(range(9))
    pages = [make_answer(segments, ranking, [], Request(4, offset)) for offset in (0, 4, 8, 12)]
    assert [ids(page) for page in pages] == [[0, 1, 2, 3], [4, 5, 6, 7], [8], []]
    assert [hit.rank for hit in pages[1]] == [5, 6, 7, 8]


def test_rows_of_later_blocks_follow_the_fused_ones():
    segments = segments_of([f"{n}.mp4" for n in range(6)])
    passages = [passage(5), passage(4)]
    shorter = ranking_of([2, 0, 4], further=[4])
    longer = ranking_of([2, 0, 4, 5, 1], blocks=[0, 0, 1, 1, 2])
    expected = ids(make_answer(segments, shorter, passages[1:], Request(10)))
    assert expected == [2, 4, 0]
    assert ids(make_answer(segments, longer, passages[1:], Request(10))) == [*expected, 5, 1]


def test_near_duplicates_are_folded_into_the_best():
    vectors = [[1, 0], [0.995, 0.0999], [0, 1], [0.9, 0.436]]
    segments = segments_of(["a.mp4", "b.mp4", "c.mp4", "d.mp4"], vectors=vectors)
    ranking = ranking_of([1, 3, 0, 2])
    assert ids(make_answer(segments, ranking, [], Request(10))) == [1, 3, 0, 2]
    answer = make_answer(segments, ranking, [], Request(10, dedupe=True))
    assert ids(answer) == [1, 3, 2]  # cosine of 0 and 1: 0.995, of 3 and 1: 0.94
    assert [one.id for one in answer[0].duplicates] == ["0"]


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_score_of_unrelated_pairs_is_weak(bias):
    segments = segments_of([f"{n}.mp4" for n in range(4)])
    ranking = ranking_of(range(4), biases=[bias] * 4)
    request = Request(10, threshold=18.5 - bias)
    answer = make_answer(segments, ranking, [passage(3)], request)
    weak = {int(hit.id): hit.weak for hit in answer}
    assert weak == {0: False, 1: False, 2: True, 3: False}  # 3 is said, whatever the picture
    said = next(hit for hit in answer if hit.id == "3")
    assert [match.source for match in said.matches] == ["speech"]
