"""Selects the queries that a report shows, with the items ranked first for each."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from xclip_jax.metrics import best_caption_scores, expected_ranks, rank_counts

SHOWN, WORST, HITS = 6, 2, 3  # numbers of queries, worst misses among them, items per ranking


@dataclasses.dataclass(frozen=True)
class RankedItem:
    """A video (or text) that is a right answer of a query or among its first results."""

    label: str
    item: int
    score: float
    kind: Literal["truth", "right", "wrong"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownQuery:
    """A text (or video) with its right answers and the items ranked first."""

    item: int
    answers: list[int]  # the right items, best score first
    rank: float  # of the best right item, as the metrics count it
    candidates: int
    truth: RankedItem  # the best right item
    hits: list[RankedItem]  # best first
    reason: str  # why the query is shown

    @property
    def rank_label(self) -> str:
        """The rank as printed: "✓ rank 1 of 1,000"."""
        return f"{'✓ ' if self.rank == 1 else ''}rank {self.rank:g} of {self.candidates:,}"


def choose_queries(
    rank_Q: Float[np.ndarray, " Q"], video_Q: Int[np.ndarray, " Q"]
) -> list[tuple[int, str]]:
    """Returns (query, reason) of a random sample and of the worst misses, no video twice.

    A miss is a query whose right answer is not ranked first. The sample is drawn
    independently of the ranks.
    """

    def pick(queries: Iterable[int], count: int, excluded: Iterable[int] = ()) -> list[int]:
        videos, picked = {int(video_Q[query]) for query in excluded}, []
        for query in queries:
            if video_Q[query] not in videos and len(picked) < count:
                videos.add(int(video_Q[query]))
                picked.append(query)
        return picked

    missed = [q for q in np.argsort(-rank_Q, kind="stable").tolist() if rank_Q[q] > 1]
    order = np.random.default_rng(0).permutation(len(rank_Q)).tolist()
    drawn = pick(order, SHOWN - min(WORST, len(missed)))
    worst = pick(missed, WORST, excluded=drawn)
    drawn = pick(order, SHOWN - len(worst), excluded=worst)
    return [(q, "drawn at random") for q in drawn] + [(q, "one of the worst misses") for q in worst]


def text_queries(
    sim_TxV: Float[np.ndarray, "T V"], text_video_T: Int[np.ndarray, " T"]
) -> list[ShownQuery]:
    """Returns the texts to show, each with the videos ranked first."""
    return _make_queries(sim_TxV, text_video_T, lambda _, video: [video])


def video_queries(
    sim_TxV: Float[np.ndarray, "T V"], text_video_T: Int[np.ndarray, " T"]
) -> list[ShownQuery]:
    """Returns the videos to show, each with the captions ranked first.

    As in the metric, only the best-scoring caption of each video is ranked.
    """

    def captions_of(query: int, video: int) -> list[int]:
        texts = np.flatnonzero(text_video_T == video)
        return texts[np.argsort(-sim_TxV[texts, query], kind="stable")].tolist()

    scores_VxV = best_caption_scores(sim_TxV, text_video_T)
    return _make_queries(scores_VxV, np.arange(len(scores_VxV)), captions_of)


def _make_queries(
    scores_QxV: Float[np.ndarray, "Q V"],
    right_Q: Int[np.ndarray, " Q"],
    items_of: Callable[[int, int], list[int]],
) -> list[ShownQuery]:
    """Returns the queries to show.

    items_of(query, video): indices of the items of a video, best first.
    """
    rank_Q = expected_ranks(*rank_counts(scores_QxV, right_Q))
    queries = []
    for query, reason in choose_queries(rank_Q, right_Q):
        right = int(right_Q[query])
        answers = items_of(query, right)
        hits = []
        for k, video in enumerate(np.argsort(-scores_QxV[query], kind="stable")[:HITS].tolist(), 1):
            label, kind = (f"{k} ✓", "right") if video == right else (f"{k}", "wrong")
            item, score = items_of(query, video)[0], float(scores_QxV[query, video])
            hits.append(RankedItem(label, item, score, kind))
        queries.append(
            ShownQuery(
                item=query,
                answers=answers,
                rank=float(rank_Q[query]),
                candidates=scores_QxV.shape[1],
                truth=RankedItem("true", answers[0], float(scores_QxV[query, right]), "truth"),
                hits=hits,
                reason=reason,
            )
        )
    return queries
