"""Retrieval metrics as expectations under random tie-breaking.

With g items strictly better than the correct one and e others equal to it, its rank is
1 + g + e/2, and it counts clip((K - g) / (e + 1), 0, 1) towards R@K: ties are neither free wins nor
counted twice.
"""

import numpy as np
from scipy.special import log_softmax, logsumexp

RECALLS = (1, 5, 10)


def rank_counts(scores_QxG, correct_Q):
    """Counts, for each of Q queries, the gallery items above and level with its correct one.

    Args:
        scores_QxG: finite scores of every query against every gallery item; higher is better.
        correct_Q: int index of the one correct item of each query.

    Returns:
        (better_Q, equal_Q): how many items are strictly better than the correct one, and how many
        others are equal to it.

    Raises:
        ValueError: a score is NaN or infinite (a NaN would count as a perfect rank).
    """
    scores_QxG = np.asarray(scores_QxG)
    if not np.isfinite(scores_QxG).all():
        raise ValueError("similarities contain NaN or infinite values")
    target_Qx1 = np.take_along_axis(scores_QxG, np.asarray(correct_Q)[:, None], 1)
    better_Q = (scores_QxG > target_Qx1).sum(1)
    equal_Q = (scores_QxG == target_Qx1).sum(1) - 1
    return better_Q, equal_Q


def expected_ranks(better_Q, equal_Q):
    """Mean rank of the correct item when ties are broken at random; 1 = best."""
    return 1 + better_Q + equal_Q / 2


def summarize(better_Q, equal_Q):
    """R@1, R@5, R@10 in percent, and the median and mean expected rank (1 = best)."""
    ranks_Q = expected_ranks(better_Q, equal_Q)
    recalls = {f"R@{k}": float(recall(better_Q, equal_Q, k).mean()) for k in RECALLS}
    return {**recalls, "MdR": float(np.median(ranks_Q)), "MnR": float(ranks_Q.mean())}


def recall(better_Q, equal_Q, k):
    """R@k of each query alone, in percent: 0 or 100 where there are no ties."""
    return 100 * np.clip((k - better_Q) / (equal_Q + 1), 0, 1)


def best_caption_scores(sim_TxV, text_video_T):
    """V x V scores of every video (row) against every candidate video's best-scoring caption.

    Raises:
        ValueError: a video has no caption.
    """
    num_videos = sim_TxV.shape[1]
    if set(np.unique(text_video_T)) != set(range(num_videos)):
        raise ValueError("every video needs a caption")
    best_VxV = np.full((num_videos, num_videos), -np.inf, sim_TxV.dtype)
    np.maximum.at(best_VxV, text_video_T, sim_TxV)
    return best_VxV.T


def retrieval_metrics(sim_TxV, text_video_T):
    """Metrics both ways: single captions, many captions a video, or paragraphs.

    Text-to-video ranks each caption alone. Video-to-text ranks the videos' captions, each candidate
    video by its best-scoring one; with one caption a video that is plain ranking of captions.

    Args:
        sim_TxV: similarities, rows texts, columns videos.
        text_video_T: int, the index of each text's video.

    Returns:
        {"text_to_video": {...}, "video_to_text": {...}}, see `summarize`.
    """
    counts = retrieval_counts(sim_TxV, text_video_T)
    return {way: summarize(*both) for way, both in counts.items()}


def retrieval_counts(sim_TxV, text_video_T):
    """What `retrieval_metrics` sums up: {direction: (better_Q, equal_Q)}, see `rank_counts`."""
    video_to_text = video_to_text_counts(sim_TxV, text_video_T)  # refuses a video without caption
    return {"text_to_video": rank_counts(sim_TxV, text_video_T), "video_to_text": video_to_text}


def video_to_text_counts(sim_TxV, text_video_T):
    """One direction of `retrieval_counts`."""
    by_video_VxV = best_caption_scores(np.asarray(sim_TxV), np.asarray(text_video_T))
    return rank_counts(by_video_VxV, np.arange(len(by_video_VxV)))


def dual_softmax(scores_QxG):
    """Scores times their softmax over the queries.

    Dual Softmax at inference: CAMoE, Cheng et al., 2021, https://arxiv.org/abs/2109.04290.
    Assumes that all queries are known at once and that each gallery item is wanted by about one of
    them, as in a benchmark and not in a search engine.

    Args:
        scores_QxG: scaled similarities (logits) of every query with every gallery item.

    Returns:
        Q x G float64.
    """
    scores_QxG = np.asarray(scores_QxG, np.float64)
    return scores_QxG * np.exp(log_softmax(scores_QxG, axis=0))


def qb_norm(scores_QxG, bank_BxG, beta=20.0):
    """Querybank normalisation with the dynamic inverted softmax.

    QB-Norm, Bogolin et al., CVPR 2022, https://arxiv.org/abs/2112.12777. The queries whose
    best gallery item is also the best one of a query of the bank (an item that attracts many: a
    hub) are ranked by exp(beta s) / sum over the bank of exp(beta s), the others as they are.
    Assumes a bank of queries like those to come; needs neither other test queries nor pairs.

    Args:
        scores_QxG: similarities (cosines) of every query with every gallery item.
        bank_BxG: the same of the bank's queries, such as captions of the training split.
        beta: inverse temperature; the paper's 20 is for cosines.

    Returns:
        Q x G float64; only the order within a row means anything (rows are logarithms or raw).
    """
    scores_QxG = np.asarray(scores_QxG, np.float64)
    bank_BxG = np.asarray(bank_BxG, np.float64)
    hubs = np.unique(bank_BxG.argmax(1))
    near_hub_Q = np.isin(scores_QxG.argmax(1), hubs)
    normalised_QxG = beta * scores_QxG - logsumexp(beta * bank_BxG, axis=0)
    return np.where(near_hub_Q[:, None], normalised_QxG, scores_QxG)
