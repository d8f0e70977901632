"""Retrieval metrics, and normalisations of scores at test time.

Metrics are expectations under random tie-breaking. With g items strictly better than the correct
one and e others equal to it, its rank is 1 + g + e/2, and it counts clip((K - g) / (e + 1), 0, 1)
towards R@K.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.special import log_softmax, logsumexp

RECALLS = (1, 5, 10)
Ranks = Int[np.ndarray, " Q"]
RankCounts = tuple[Ranks, Ranks]  # (better, equal), see rank_counts
Scores = Shaped[np.ndarray, "Q G"]


def rank_counts(scores_QxG: Scores, correct_Q: Ranks) -> RankCounts:
    """Counts the gallery items scored above and equal to the correct item of each query.

    Args:
        scores_QxG: finite scores of Q queries with G gallery items; higher is better.
        correct_Q: index of the one correct item of each query.

    Returns:
        (better_Q, equal_Q): numbers of items strictly better than the correct one, and of other
        items equal to it.

    Raises:
        ValueError: a score is NaN or infinite (a NaN would count as a perfect rank).
    """
    if not np.isfinite(scores_QxG).all():
        raise ValueError("similarities contain NaN or infinite values")
    target_Qx1 = np.take_along_axis(scores_QxG, correct_Q[:, None], 1)
    better_Q = (scores_QxG > target_Qx1).sum(1)
    equal_Q = (scores_QxG == target_Qx1).sum(1) - 1
    return better_Q, equal_Q


def expected_ranks(better_Q: Ranks, equal_Q: Ranks) -> Float[np.ndarray, " Q"]:
    """Returns the mean rank of each correct item under random tie-breaking (1 is best)."""
    return 1 + better_Q + equal_Q / 2


def recall(better_Q: Ranks, equal_Q: Ranks, k: int) -> Float[np.ndarray, " Q"]:
    """Returns R@k of each query in percent: 0 or 100 where there are no ties."""
    return 100 * np.clip((k - better_Q) / (equal_Q + 1), 0, 1)


def summarize(better_Q: Ranks, equal_Q: Ranks) -> dict[str, float]:
    """Returns R@1, R@5, R@10 in percent and the median (MdR) and mean (MnR) expected rank."""
    ranks_Q = expected_ranks(better_Q, equal_Q)
    recalls = {f"R@{k}": float(recall(better_Q, equal_Q, k).mean()) for k in RECALLS}
    return {**recalls, "MdR": float(np.median(ranks_Q)), "MnR": float(ranks_Q.mean())}


def retrieval_metrics(
    sim_TxV: Shaped[np.ndarray, "T V"], text_video_T: Int[np.ndarray, " T"]
) -> dict[str, dict[str, float]]:
    """Returns the metrics of both directions for one or several captions per video.

    Text-to-video ranks each caption alone. Video-to-text scores each candidate video by its
    best-scoring caption; with one caption per video this is plain ranking of captions.

    Args:
        sim_TxV: similarities, rows texts, columns videos.
        text_video_T: index of each text's video.

    Returns:
        {"text_to_video": {...}, "video_to_text": {...}}, see `summarize`.
    """
    counts = retrieval_counts(sim_TxV, text_video_T)
    return {way: summarize(*both) for way, both in counts.items()}


def retrieval_counts(
    sim_TxV: Shaped[np.ndarray, "T V"], text_video_T: Int[np.ndarray, " T"]
) -> dict[str, RankCounts]:
    """Returns the rank counts of both directions, see `rank_counts`."""
    by_video = video_to_text_counts(sim_TxV, text_video_T)  # raises for a video without caption
    return {"text_to_video": rank_counts(sim_TxV, text_video_T), "video_to_text": by_video}


def video_to_text_counts(
    sim_TxV: Shaped[np.ndarray, "T V"], text_video_T: Int[np.ndarray, " T"]
) -> RankCounts:
    """Returns the rank counts of the video-to-text direction."""
    scores_VxV = best_caption_scores(sim_TxV, text_video_T)
    return rank_counts(scores_VxV, np.arange(len(scores_VxV)))


def best_caption_scores(
    sim_TxV: Shaped[np.ndarray, "T V"], text_video_T: Int[np.ndarray, " T"]
) -> Shaped[np.ndarray, "V V"]:
    """Returns the score of each video (row) with each candidate video's best-scoring caption.

    Raises:
        ValueError: a video has no caption.
    """
    num_videos = sim_TxV.shape[1]
    if set(np.unique(text_video_T)) != set(range(num_videos)):
        raise ValueError("every video needs a caption")
    best_VxV = np.full((num_videos, num_videos), -np.inf, sim_TxV.dtype)
    np.maximum.at(best_VxV, text_video_T, sim_TxV)
    return best_VxV.T


def dual_softmax(scores_QxG: Scores) -> Float[np.ndarray, "Q G"]:
    """Returns the scores times their softmax over the queries, in float64.

    Dual Softmax at inference: CAMoE, Cheng et al., 2021, https://arxiv.org/abs/2109.04290.
    Assumes that all queries are known at once and that each gallery item is relevant to about one
    of them, as in a benchmark but not in a search engine.

    Args:
        scores_QxG: scaled similarities (logits) of Q queries with G gallery items.
    """
    scores_QxG = np.asarray(scores_QxG, np.float64)
    return scores_QxG * np.exp(log_softmax(scores_QxG, axis=0))


def qb_norm(
    scores_QxG: Scores, bank_BxG: Shaped[np.ndarray, "B G"], beta: float = 20.0
) -> Float[np.ndarray, "Q G"]:
    """Returns scores after querybank normalisation with the dynamic inverted softmax, in float64.

    QB-Norm, Bogolin et al., CVPR 2022, https://arxiv.org/abs/2112.12777. A hub is a gallery item
    that is the best one of a query of the bank. Queries whose best item is a hub are ranked by
    exp(beta s) / sum over the bank of exp(beta s), other queries by s. Assumes that the bank
    resembles the queries; needs neither other test queries nor pairs.

    Args:
        scores_QxG: similarities (cosines) of Q queries with G gallery items.
        bank_BxG: similarities of the B queries of the bank, such as training captions.
        beta: inverse temperature; 20 in the paper, for cosines.

    Returns:
        Scores to be compared within a row only (some rows are logarithms).
    """
    scores_QxG = np.asarray(scores_QxG, np.float64)
    bank_BxG = np.asarray(bank_BxG, np.float64)
    hubs = np.unique(bank_BxG.argmax(1))
    near_hub_Q = np.isin(scores_QxG.argmax(1), hubs)
    normalized_QxG = beta * scores_QxG - np.asarray(logsumexp(beta * bank_BxG, axis=0))
    return np.where(near_hub_Q[:, None], normalized_QxG, scores_QxG)
