"""Tests of retrieval metrics against values by hand and against all tie-breaking orders."""

import itertools

import numpy as np
import pytest

from xclip_jax.metrics import (
    best_caption_scores,
    expected_ranks,
    rank_counts,
    recall,
    recall_of_any,
    retrieval_metrics,
    summarize,
)

DIRECTIONS = ("text_to_video", "video_to_text")


def brute_force(scores_QxG, correct_Q):
    """Returns (expected ranks, {K: probabilities of a hit}) over all orders of equal scores."""
    size = scores_QxG.shape[1]
    ranks, recalls = [], {k: [] for k in (1, 5, 10)}
    for scores, correct in zip(scores_QxG, correct_Q, strict=True):
        places = []
        for tie_break in itertools.permutations(range(size)):
            order = sorted(range(size), key=lambda item: (-scores[item], tie_break[item]))
            places.append(1 + order.index(correct))
        ranks.append(np.mean(places))
        for k, chances in recalls.items():
            chances.append(np.mean(np.array(places) <= k))
    return np.array(ranks), recalls


def check_against_brute_force(found, scores_QxG, correct_Q):
    ranks, recalls = brute_force(scores_QxG, correct_Q)
    for k, chances in recalls.items():
        assert found[f"R@{k}"] == pytest.approx(100 * np.mean(chances))
    assert found["MnR"] == pytest.approx(ranks.mean())
    assert found["MdR"] == pytest.approx(np.median(ranks))


def test_ties_match_values_by_hand():
    sim_TxV = np.array(
        [
            [0.9, 0.1, 0.2],  # its video first
            [0.5, 0.5, 0.5],  # all equal: rank 2, counts 1/3 towards R@1
            [0.8, 0.3, 0.3],  # one better, one equal: rank 2.5, counts 0
        ]
    )
    better, equal = rank_counts(sim_TxV, np.arange(3))
    assert better.tolist() == [0, 0, 1]
    assert equal.tolist() == [0, 2, 1]
    metrics = retrieval_metrics(sim_TxV, np.arange(3))
    assert metrics["text_to_video"] == pytest.approx(
        {"R@1": 100 * (1 + 1 / 3) / 3, "R@5": 100, "R@10": 100, "MdR": 2, "MnR": 5.5 / 3}
    )
    # The columns: 0.9 is best of (0.9, 0.5, 0.8); 0.5 of (0.1, 0.5, 0.3); 0.3 second of three.
    assert metrics["video_to_text"] == pytest.approx(
        {"R@1": 200 / 3, "R@5": 100, "R@10": 100, "MdR": 1, "MnR": 4 / 3}
    )


def test_recall_is_the_probability_of_a_hit_under_ties():
    """Takes 3 better and 3 equal scores: R@1 0, R@5 (5 - 3) / 4, R@10 1, rank 1 + 3 + 3 / 2."""
    found = summarize(np.array([3]), np.array([3]))
    assert found == pytest.approx({"R@1": 0, "R@5": 50, "R@10": 100, "MdR": 5.5, "MnR": 5.5})


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_the_mean_over_all_tie_breaking_orders(seed):
    sim_TxV = np.random.default_rng(seed).integers(0, 3, (6, 6)).astype(np.float32)
    metrics = retrieval_metrics(sim_TxV, np.arange(6))
    check_against_brute_force(metrics["text_to_video"], sim_TxV, np.arange(6))
    check_against_brute_force(metrics["video_to_text"], sim_TxV.T, np.arange(6))


@pytest.mark.parametrize("seed", range(3))
def test_several_captions_match_brute_force(seed):
    rng = np.random.default_rng(seed)
    text_video = rng.permutation([0, 0, 0, 1, 2, 2, 3, 4])
    sim_TxV = rng.integers(0, 4, (8, 5)).astype(np.float32)
    metrics = retrieval_metrics(sim_TxV, text_video)
    check_against_brute_force(metrics["text_to_video"], sim_TxV, text_video)
    best = np.array(
        [
            [
                max(sim_TxV[t, v] for t in range(8) if text_video[t] == candidate)
                for candidate in range(5)
            ]
            for v in range(5)
        ]
    )
    np.testing.assert_array_equal(best_caption_scores(sim_TxV, text_video), best)
    check_against_brute_force(metrics["video_to_text"], best, np.arange(5))


def test_equal_scores_give_chance_level():
    metrics = retrieval_metrics(np.full((40, 20), 0.25, np.float32), np.arange(40) // 2)
    for direction in DIRECTIONS:
        expected = {"R@1": 5, "R@5": 25, "R@10": 50, "MdR": 10.5, "MnR": 10.5}
        assert metrics[direction] == pytest.approx(expected)


def test_perfect_and_worst_rankings():
    eye = np.eye(12)
    for direction in DIRECTIONS:
        best = retrieval_metrics(eye, np.arange(12))[direction]
        assert best == {"R@1": 100, "R@5": 100, "R@10": 100, "MdR": 1, "MnR": 1}
        worst = retrieval_metrics(-eye, np.arange(12))[direction]
        assert worst == {"R@1": 0, "R@5": 0, "R@10": 0, "MdR": 12, "MnR": 12}


def test_one_pair_is_perfect():
    for direction in retrieval_metrics(np.array([[0.3]]), np.array([0])).values():
        assert direction == {"R@1": 100, "R@5": 100, "R@10": 100, "MdR": 1, "MnR": 1}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_an_error(bad):
    sim_TxV = np.eye(3)
    sim_TxV[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        retrieval_metrics(sim_TxV, np.arange(3))


@pytest.mark.parametrize("text_video", [[0, 1, 1], [0, 1, 3], [-1, 1, 2]])
def test_video_without_caption_is_an_error(text_video):
    with pytest.raises(ValueError, match="every video must have a caption"):
        retrieval_metrics(np.eye(3), np.array(text_video))


def test_one_text_per_video_matches_values_by_hand():
    """Follows the protocols paragraph and single caption, with correct pairs on the diagonal."""
    sim_TxV = np.array([[3.0, 1.0, 2.0], [5.0, 4.0, 4.0], [0.0, 9.0, 8.0]])
    # Texts: first; one better, one equal; one better. Videos: one better (5 > 3); two
    # (9 > 4, then 1 below): one better; first (8).
    metrics = retrieval_metrics(sim_TxV, np.arange(3))
    assert metrics["text_to_video"] == pytest.approx(
        {"R@1": 100 / 3, "R@5": 100, "R@10": 100, "MdR": 2, "MnR": (1 + 2.5 + 2) / 3}
    )
    assert metrics["video_to_text"] == pytest.approx(
        {"R@1": 100 / 3, "R@5": 100, "R@10": 100, "MdR": 2, "MnR": (2 + 2 + 1) / 3}
    )


def test_many_captions_match_values_by_hand():
    """Ranks three captions of video 0 and one of video 1, with a tie between captions of both."""
    sim_TxV = np.array([[2.0, 3.0], [7.0, 5.0], [4.0, 4.0], [6.0, 5.0]])
    metrics = retrieval_metrics(sim_TxV, np.array([0, 0, 0, 1]))
    # Each caption alone: second; first; equal (rank 1.5, counts 1/2); second.
    assert metrics["text_to_video"] == pytest.approx(
        {"R@1": 100 * 1.5 / 4, "R@5": 100, "R@10": 100, "MdR": 1.75, "MnR": 6.5 / 4}
    )
    # The best caption of each: video 0: 7 against 6. Video 1: 5 against 5, equal.
    assert metrics["video_to_text"] == pytest.approx(
        {"R@1": 75, "R@5": 100, "R@10": 100, "MdR": 1.25, "MnR": 1.25}
    )


def release_metrics(scores_QxG, correct_Q, median):
    """Returns the metrics of the PyTorch release, by the position of a score in its sorted row."""
    sorted_QxG = -np.sort(-scores_QxG, 1)
    right_Q = scores_QxG[np.arange(len(scores_QxG)), correct_Q]
    places_Q = np.array([np.where(row == s)[0][0] for row, s in zip(sorted_QxG, right_Q)])  # noqa: B905
    recalls = {f"R@{k}": 100 * np.mean(places_Q < k) for k in (1, 5, 10)}
    return {**recalls, "MdR": median(places_Q) + 1, "MnR": places_Q.mean() + 1}


def lower_median(values):
    """Returns the lower of the two middle values, as torch.median in the release's MSVD metrics."""
    return np.sort(values)[(len(values) - 1) // 2]


@pytest.mark.parametrize(("seed", "number"), [(0, 40), (1, 41)])
def test_metrics_without_ties_match_the_release(seed, number):
    rng = np.random.default_rng(seed)
    # One text per video.
    sim_TxV = rng.normal(size=(number, number)) + 1.5 * np.eye(number)
    ours = retrieval_metrics(sim_TxV, np.arange(number))
    everyone = np.arange(number)
    theirs = release_metrics(sim_TxV, everyone, np.median)
    assert ours["text_to_video"] == pytest.approx(theirs)
    assert ours["video_to_text"] == pytest.approx(release_metrics(sim_TxV.T, everyone, np.median))
    # Several: equal except the median, which is the lower of two middle ranks in the release.
    text_video = np.sort(rng.integers(0, number, 5 * number))
    text_video[:number] = everyone
    sim_TxV = rng.normal(size=(len(text_video), number))
    sim_TxV[np.arange(len(text_video)), text_video] += 1.5
    ours = retrieval_metrics(sim_TxV, text_video)
    best_VxV = np.stack([sim_TxV[text_video == v].max(0) for v in range(number)], 1)
    for way, scores, right in (
        ("text_to_video", sim_TxV, text_video),
        ("video_to_text", best_VxV, everyone),
    ):
        theirs = release_metrics(scores, right, lower_median)
        ranks = expected_ranks(*rank_counts(scores, right))
        assert ours[way].pop("MdR") == np.median(ranks)
        assert theirs.pop("MdR") == lower_median(ranks)
        assert ours[way] == pytest.approx(theirs)


def test_recall_of_any_by_hand():
    scores_QxG = np.array([[5, 4, 3, 2, 1], [5, 4, 3, 2, 1], [1, 1, 1, 1, 0], [9, 1, 1, 1, 1]])
    relevant_QxG = np.array([[1, 0, 0, 0, 1], [0, 0, 1, 1, 0], [1, 1, 0, 0, 1], [0, 1, 0, 0, 0]])
    found = {k: recall_of_any(scores_QxG * 1.0, relevant_QxG > 0, k) for k in (1, 2, 3, 9)}
    np.testing.assert_allclose(found[1], [100, 0, 50, 0])
    np.testing.assert_allclose(found[2], [100, 0, 100 * 5 / 6, 25])
    np.testing.assert_allclose(found[3], [100, 100, 100, 50])
    np.testing.assert_allclose(found[9], 100)


def test_recall_of_any_equals_the_mean_over_all_orders_of_ties():
    rng = np.random.default_rng(0)
    scores_QxG = rng.integers(0, 3, (20, 5)).astype(float)
    relevant_QxG = rng.random((20, 5)) < 0.4
    relevant_QxG[:, 0] |= ~relevant_QxG.any(1)
    for k in (1, 2, 3):
        hits = np.zeros(20)
        orders = [*itertools.permutations(range(5))]
        for order in orders:
            ranking = np.array(order)[np.argsort(-scores_QxG[:, order], axis=1, kind="stable")]
            hits += np.take_along_axis(relevant_QxG, ranking, 1)[:, :k].any(1)
        expected = 100 * hits / len(orders)
        np.testing.assert_allclose(recall_of_any(scores_QxG, relevant_QxG, k), expected)


def test_recall_of_any_of_one_right_item_is_recall():
    rng = np.random.default_rng(1)
    scores_QxG, correct_Q = rng.integers(0, 4, (30, 7)).astype(float), rng.integers(0, 7, 30)
    for k in (1, 5, 10):
        expected = recall(*rank_counts(scores_QxG, correct_Q), k)
        np.testing.assert_allclose(
            recall_of_any(scores_QxG, np.eye(7, dtype=bool)[correct_Q], k), expected
        )


def test_recall_of_any_rejects_nan_and_queries_without_right_item():
    with pytest.raises(ValueError, match="NaN"):
        recall_of_any(np.array([[np.nan, 1.0]]), np.array([[True, False]]), 1)
    with pytest.raises(ValueError, match="right item"):
        recall_of_any(np.array([[0.0, 1.0]]), np.array([[False, False]]), 1)
