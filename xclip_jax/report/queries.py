"""Which queries a report shows, and what was ranked first for them."""

import dataclasses

import numpy as np

from xclip_jax.metrics import best_caption_scores, expected_ranks, rank_counts


@dataclasses.dataclass
class Hit:
    """A video (or a text) that a query found."""

    item: int
    score: float
    right: bool


@dataclasses.dataclass
class Query:
    """A text (or a video) and what was ranked first for it."""

    item: int
    answers: list[int]  # right items, best score first
    score: float  # of the best right item
    rank: float  # of the best right item, as the metrics count it
    candidates: int
    hits: list[Hit]  # the best first
    reason: str = ""  # why it is shown


def pick(rank_Q, video_Q, number=6, misses=2, seed=0):
    """The queries to show, [(query, reason)]: most drawn at random, then some of the worst misses.

    A miss is a right answer not ranked first. `video_Q` is each query's video: none comes twice.
    The random draw comes first and does not look at the ranks, so it is a fair sample.
    """

    def first_of_each(queries, seen):
        return [q for q in queries if video_Q[q] not in seen and not seen.add(video_Q[q])]

    missed = [q for q in np.argsort(-np.asarray(rank_Q), kind="stable") if rank_Q[q] > 1]
    order = np.random.default_rng(seed).permutation(len(rank_Q))
    drawn = first_of_each(order, set())[: number - min(misses, len(missed))]
    worst = first_of_each(missed, {video_Q[q] for q in drawn})[:misses]
    drawn = first_of_each(order, {video_Q[q] for q in worst})[: number - len(worst)]
    return [(int(q), "drawn at random") for q in drawn] + [
        (int(q), "one of the worst misses") for q in worst
    ]


def text_queries(sim_TxV, text_video, top=3, **options):
    """Texts to show and the `top` videos ranked first for each; `options` as of `pick`."""
    rank_T = expected_ranks(*rank_counts(sim_TxV, text_video))
    queries = []
    for text, reason in pick(rank_T, text_video, **options):
        best = np.argsort(-sim_TxV[text], kind="stable")[:top]
        truth = int(text_video[text])
        hits = [Hit(int(v), float(sim_TxV[text, v]), bool(v == truth)) for v in best]
        score, rank = float(sim_TxV[text, truth]), float(rank_T[text])
        queries.append(Query(text, [truth], score, rank, sim_TxV.shape[1], hits, reason))
    return queries


def video_queries(sim_TxV, text_video, top=3, **options):
    """Videos to show and the `top` captions ranked first; `options` as of `pick`.

    As in the metric, a video competes with its best-scoring caption only: one caption per video.
    """
    scores_VxV = best_caption_scores(sim_TxV, text_video)  # rows: the video asked for
    everyone = np.arange(len(scores_VxV))
    rank_V = expected_ranks(*rank_counts(scores_VxV, everyone))
    queries = []
    for video, reason in pick(rank_V, everyone, **options):

        def captions_of(candidate, video=video):  # best first
            texts = np.flatnonzero(text_video == candidate)
            return texts[np.argsort(-sim_TxV[texts, video], kind="stable")].tolist()

        row = scores_VxV[video]
        best = np.argsort(-row, kind="stable")[:top]
        hits = [Hit(captions_of(b)[0], float(row[b]), bool(b == video)) for b in best]
        score, rank = float(row[video]), float(rank_V[video])
        queries.append(Query(video, captions_of(video), score, rank, len(row), hits, reason))
    return queries
