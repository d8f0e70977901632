"""Retrieval metrics, and normalisations of scores at test time.

Metrics are expectations under random tie-breaking. With g items strictly better than the correct
one and e others equal to it, its rank is 1 + g + e/2, and it counts clip((K - g) / (e + 1), 0, 1)
towards R@K.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.special import comb, log_softmax, logsumexp

Ranks = Int[np.ndarray, "*S Q"]  # of the Q queries of one or several seeds
RankCounts = tuple[Ranks, Ranks]  # (better, equal), see rank_counts
Scores = Shaped[np.ndarray, "Q G"]
Similarities = Shaped[np.ndarray, "T V"]
TextVideo = Int[np.ndarray, " T"]  # index of each text's video
Bank = Shaped[np.ndarray, "B G"]
# Inverse temperature of banks of queries, for cosines: the value of QB-Norm's paper. On the demo's
# validation clips, 10 to 50 and means of the 10 to 100 largest similarities differ by less than the
# noise. Small values approach the mean of the similarities, which ignores what an item is close to,
# large ones their maximum, which depends on a single query.
BETA = 20.0
# Captions of a bank for the hubness bias. The bias from fewer depends on which ones they are: with
# 100, R@1 of two models of the demo was 12 and 21 lower than with 1,000 (2026-11-26, recipe 3). The
# features of more captions take gigabytes of memory while segments are indexed.
MIN_CAPTIONS, MAX_CAPTIONS = 100, 5000
Metrics = dict[str, dict[str, float]]  # by direction and name


def rank_counts(scores_QxG: Scores, correct_Q: Ranks) -> RankCounts:
    """Returns (better, equal), the numbers of items above and equal to each query's correct one.

    Higher scores of the Q queries with the G gallery items are better. Raises ValueError if a score
    is NaN or infinite (a NaN would count as a perfect rank).
    """
    if not np.isfinite(scores_QxG).all():
        raise ValueError("similarities contain NaN or infinite values")
    target_Qx1 = np.take_along_axis(scores_QxG, correct_Q[:, None], 1)
    return (scores_QxG > target_Qx1).sum(1), (scores_QxG == target_Qx1).sum(1) - 1


def expected_ranks(better_Q: Ranks, equal_Q: Ranks) -> Float[np.ndarray, "*S Q"]:
    """Returns the mean rank of each correct item under random tie-breaking (1 is best)."""
    return 1 + better_Q + equal_Q / 2


def recall(better_Q: Ranks, equal_Q: Ranks, k: int) -> Float[np.ndarray, "*S Q"]:
    """Returns R@k of each query in percent: 0 or 100 where there are no ties."""
    return 100 * np.clip((k - better_Q) / (equal_Q + 1), 0, 1)


def recall_of_any(
    scores_QxG: Scores, relevant_QxG: Bool[np.ndarray, "Q G"], k: int
) -> Float[np.ndarray, " Q"]:
    """Returns R@k in percent of queries with several right items, of which one suffices.

    With g wrong items above the best right one, and r right and e wrong items equal to it, it is
    the probability 1 - C(e, k - g) / C(r + e, k - g) that the first k include a right one. If all
    scores are equal, it is that of a random order. Raises ValueError if a score is NaN or infinite,
    or a query has no right item.
    """
    if not np.isfinite(scores_QxG).all():
        raise ValueError("similarities contain NaN or infinite values")
    if not relevant_QxG.any(1).all():
        raise ValueError("every query must have a right item")
    best_Qx1 = np.where(relevant_QxG, scores_QxG, -np.inf).max(1, keepdims=True)
    tied_QxG = scores_QxG == best_Qx1
    wrong_Q, tied_Q = (tied_QxG & ~relevant_QxG).sum(1), tied_QxG.sum(1)
    places_Q = np.clip(k - (scores_QxG > best_Qx1).sum(1), 0, tied_Q)
    return np.asarray(100 * (1 - comb(wrong_Q, places_Q) / comb(tied_Q, places_Q)))


def summarize(better_Q: Ranks, equal_Q: Ranks) -> dict[str, float]:
    """Returns R@1, R@5, R@10 in percent and the median (MdR) and mean (MnR) expected rank."""
    ranks_Q = expected_ranks(better_Q, equal_Q)
    recalls = {f"R@{k}": float(recall(better_Q, equal_Q, k).mean()) for k in (1, 5, 10)}
    return {**recalls, "MdR": float(np.median(ranks_Q)), "MnR": float(ranks_Q.mean())}


def retrieval_metrics(sim_TxV: Similarities, text_video_T: TextVideo) -> Metrics:
    """Returns {"text_to_video": metrics, "video_to_text": metrics}, see `summarize`."""
    counts = retrieval_counts(sim_TxV, text_video_T)
    return {way: summarize(*both) for way, both in counts.items()}


def retrieval_counts(sim_TxV: Similarities, text_video_T: TextVideo) -> dict[str, RankCounts]:
    """Returns the rank counts of both directions, for one or several captions per video.

    Text-to-video ranks each caption alone. Video-to-text scores each candidate video by its
    best-scoring caption; with one caption per video this is plain ranking of captions.
    """
    best_VxV = best_caption_scores(sim_TxV, text_video_T)
    return {
        "text_to_video": rank_counts(sim_TxV, text_video_T),
        "video_to_text": rank_counts(best_VxV, np.arange(len(best_VxV))),
    }


def best_caption_scores(sim_TxV: Similarities, text_video_T: TextVideo) -> np.ndarray:
    """Returns V x V scores of each video (row) with each candidate video's best-scoring caption.

    Raises ValueError if a video has no caption.
    """
    num_videos = sim_TxV.shape[1]
    if set(text_video_T.tolist()) != set(range(num_videos)):
        raise ValueError("every video must have a caption")
    best_VxV = np.full((num_videos, num_videos), -np.inf, sim_TxV.dtype)
    np.maximum.at(best_VxV, text_video_T, sim_TxV)
    return best_VxV.T


def dual_softmax(scores_QxG: Scores) -> Float[np.ndarray, "Q G"]:
    """Returns logits of Q queries with G items times their softmax over queries, in float64.

    Dual Softmax at inference: CAMoE, Cheng et al., 2021, https://arxiv.org/abs/2109.04290.
    Assumes that all queries are known at once and that each gallery item is relevant to about one
    of them, as in a benchmark but not in a search engine.
    """
    scores_QxG = scores_QxG.astype(np.float64)
    return scores_QxG * np.exp(log_softmax(scores_QxG, axis=0))


def qb_norm(scores_QxG: Scores, bank_BxG: Bank, beta: float = BETA) -> Float[np.ndarray, "Q G"]:
    """Returns scores after querybank normalisation with the dynamic inverted softmax, in float64.

    QB-Norm, Bogolin et al., CVPR 2022, https://arxiv.org/abs/2112.12777. A hub is a gallery item
    that is the best one of a query of the bank. Queries whose best item is a hub are ranked by
    exp(beta s) / sum over the bank of exp(beta s), other queries by s, so scores can be compared
    within a row only. Assumes that the bank resembles the queries; needs neither other test queries
    nor pairs.

    Args:
        scores_QxG: similarities (cosines) of Q queries with G gallery items.
        bank_BxG: similarities of the B queries of the bank, such as training captions.
        beta: inverse temperature.
    """
    scores_QxG, bank_BxG = scores_QxG.astype(np.float64), bank_BxG.astype(np.float64)
    near_hub_Q = np.isin(scores_QxG.argmax(1), bank_BxG.argmax(1))
    normalized_QxG = beta * scores_QxG - np.asarray(logsumexp(beta * bank_BxG, axis=0))
    return np.where(near_hub_Q[:, None], normalized_QxG, scores_QxG)


def hubness_bias(bank_BxG: Bank, beta: float = BETA) -> Float[np.ndarray, " G"]:
    """Returns the bias of each of G gallery items to be subtracted from its scores, in float64.

    It is the log-mean-exp, log(mean over the bank of exp(beta s)) / beta, of the item's
    similarities to B queries such as training captions: large for a hub, which is similar to many
    of them. A query's ranking by s - bias depends on no other query. QB-Norm ranks the queries near
    a hub in the same order. Assumes that the bank resembles the queries.

    Args:
        bank_BxG: similarities (cosines) of the B queries of the bank.
        beta: inverse temperature.
    """
    sums_G = np.asarray(logsumexp(beta * bank_BxG.astype(np.float64), axis=0))
    return (sums_G - np.log(len(bank_BxG))) / beta


def subtract_hubness_bias(scores_QxG: Scores, bank_BxG: Bank) -> Float[np.ndarray, "Q G"]:
    """Returns similarities of Q queries with G gallery items minus `hubness_bias`, in float64."""
    return scores_QxG.astype(np.float64) - hubness_bias(bank_BxG)
