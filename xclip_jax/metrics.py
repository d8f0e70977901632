"""Retrieval metrics as expectations under random tie-breaking.

With g items strictly better than the correct one and e others equal to it, its rank is
1 + g + e/2, and it counts clip((K - g) / (e + 1), 0, 1) towards R@K: ties are neither free wins nor
counted twice.
"""

import numpy as np

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
