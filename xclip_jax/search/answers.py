"""Makes the answer to a query: segments become moments, sources are fused, repetitions merged."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from xclip_jax.search.funnel import FURTHER, Ranking
from xclip_jax.search.moments import Moment, MomentFinder, Piece, is_same_moment
from xclip_jax.search.passages import Passage
from xclip_jax.search.results import Answer, Hit, Match
from xclip_jax.search.shard import Segments

RANK_CONSTANT = 60  # of reciprocal rank fusion
DUPLICATE_COSINE = 0.98  # of video vectors, from which segments are near-duplicates


@dataclasses.dataclass(frozen=True)
class Request:
    """The part of a ranking that is asked for, and how its hits are made."""

    k: int  # number of hits
    offset: int = 0  # number of hits before them
    merge: bool = True  # False: one hit per segment
    dedupe: bool = False  # True: fold near-duplicates
    threshold: float | None = None  # of score - bias, below which a match is weak
    background: float | None = None  # similarity of unrelated sentences and frames
    interval: tuple[float, float] = (-np.inf, np.inf)  # seconds of a file in which moments must be

    @property
    def depth(self) -> int:
        """Number of hits to rank."""
        return self.offset + self.k


def make_answer(
    segments: Segments, ranking: Ranking | None, passages: Sequence[Passage], request: Request
) -> Answer:
    """Returns the hits of a ranking by pictures and of passages.

    Args:
        segments: those of the ranking and of the passages, and maybe others.
        ranking: None if pictures were not searched.
        passages: of the selected rows, best first.
        request: see `Request`.
    """
    hits = _rank_hits(segments, ranking, passages, request)
    hits = _merge(hits) if request.merge else hits
    hits = _fold(hits, segments) if request.dedupe else hits
    chosen = [hit for hit, _ in zip(hits, range(request.depth), strict=False)][request.offset :]
    hits = [_set_rank(hit, rank) for rank, hit in enumerate(chosen, request.offset + 1)]
    if ranking is None:
        return Answer(hits, {}, searched=0)
    return Answer(hits, ranking.seconds, ranking.searched)


def _set_rank(hit: Hit, rank: int) -> Hit:
    duplicates = tuple(dataclasses.replace(one, rank=rank) for one in hit.duplicates)
    return dataclasses.replace(hit, rank=rank, duplicates=duplicates)


def fuse_ranks(rankings: Iterable[Sequence[int]]) -> list[int]:
    """Returns the items of several rankings by decreasing sum of 1 / (60 + rank).

    Reciprocal rank fusion, Cormack et al., SIGIR 2009. Ties keep the order of the first ranking.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (RANK_CONSTANT + rank)
    return sorted(scores, key=lambda item: -scores[item])


def _rank_hits(
    segments: Segments, ranking: Ranking | None, passages: Sequence[Passage], request: Request
) -> Iterator[Hit]:
    """Yields a hit for each segment, best first, whose moment is that of its best source."""
    matches: dict[int, list[tuple[int, Match]]] = {}  # row -> (rank in its source, match)
    rows_of = dict(zip(segments.ids, segments.rows.tolist(), strict=True))
    by_source: dict[str, list[int]] = {}
    for passage in passages:
        row, ranks = rows_of[passage.id], by_source.setdefault(passage.match.source, [])
        if row not in ranks:
            ranks.append(row)
            matches.setdefault(row, []).append((len(ranks), passage.match))
    order, tail, moments = list(by_source.values()), [], None
    if ranking is not None:
        blocks, moments = ranking.blocks, _Moments(segments, ranking, request)
        order = [ranking.rows[blocks == 0].tolist(), *order]
        tail = ranking.rows[(blocks > 0) & (blocks < FURTHER)].tolist()
    for row in dict.fromkeys([*fuse_ranks(order), *tail]):
        found, facts, second = matches.get(row, []), {"score": None}, None
        place = moments.places.get(row) if moments else None
        if ranking is not None and moments is not None and place is not None:
            score, bias = float(ranking.scores[place]), float(ranking.biases[place])
            weak = request.threshold is not None and score - bias < request.threshold
            facts = {"score": score, "bias": bias, "weak": weak and not found}
            if not (weak and found):
                moment = moments.find(row)
                seen, second = Match("picture", score, moment.start, moment.end), moment.second
                found = [(place + 1, seen), *found]
        best, *others = (match for _, match in sorted(found, key=lambda pair: pair[0]))
        if best.source != "picture" or second is None:
            second = best.start
        moment = Moment(best.start, best.end, second)
        yield segments.hit(row, moment, **facts, matches=(best, *others))


class _Moments:
    """The moments of the rows of a ranking. Each stays in the row's block."""

    def __init__(self, segments: Segments, ranking: Ranking, request: Request) -> None:
        places = [segments.places[row] for row in ranking.rows.tolist()]
        columns = (
            [segments.paths[place] for place in places],
            segments.starts[places].tolist(),
            segments.ends[places].tolist(),
            segments.times_nxF[places].astype(float),
            ranking.similarities_nxF,
            ranking.mask_nxF,
        )
        blocks: dict[int, list[Piece]] = {}
        self.places: dict[int, int] = {}  # row -> place in the ranking
        self._indices: dict[int, tuple[int, int]] = {}  # row -> block, index in it
        for row, block, path, start, end, times, curve, mask in zip(
            ranking.rows.tolist(), ranking.blocks.tolist(), *columns, strict=True
        ):
            pieces = blocks.setdefault(block, [])
            self.places[row], self._indices[row] = len(self.places), (block, len(pieces))
            pieces.append(Piece(path, start, end, times[mask], curve[mask]))
        options: Any = {"interval": request.interval, "background": request.background}
        self._finders = {n: MomentFinder(pieces, **options) for n, pieces in blocks.items()}

    def find(self, row: int) -> Moment:
        """Returns the moment of a row."""
        block, index = self._indices[row]
        return self._finders[block].find(index)


def _merge(hits: Iterable[Hit]) -> Iterator[Hit]:
    """Yields the hits that do not repeat the moment of an earlier one, and end where it begins."""
    kept: dict[str, list[tuple[float, float]]] = {}
    for hit in hits:
        moments, moment = kept.setdefault(hit.path, []), (hit.start, hit.end)
        if not any(is_same_moment(one, moment, hit.second) for one in moments):
            start = max([hit.start, *(one[1] for one in moments if one[1] <= hit.second)])
            end = min([hit.end, *(one[0] for one in moments if one[0] > hit.second)])
            moments.append((start, end))
            yield _trim(hit, start, end)


def _trim(hit: Hit, start: float, end: float) -> Hit:
    """Returns a hit whose moment, and that of its best source, starts and ends at these seconds."""
    best = dataclasses.replace(hit.matches[0], start=start, end=end)
    return dataclasses.replace(hit, start=start, end=end, matches=(best, *hit.matches[1:]))


def _fold(hits: Iterable[Hit], segments: Segments) -> list[Hit]:
    """Returns hits with near-duplicates of an earlier one listed in it.

    They have nearly the same video vector, and what was said or written in them, if that is why
    they were found, is equal.
    """
    hits, places = list(hits), {one: place for place, one in enumerate(segments.ids)}
    vectors = segments.vectors_nxD[[places[hit.id] for hit in hits]].astype(np.float32)
    firsts = np.zeros_like(vectors)  # of each group
    groups: list[list[Hit]] = []
    for hit, vector in zip(hits, vectors, strict=True):
        near = np.flatnonzero(firsts[: len(groups)] @ vector >= DUPLICATE_COSINE)
        same = [k for k in near if groups[k][0].matches[0].text == hit.matches[0].text]
        if same:
            groups[same[0]].append(hit)
        else:
            firsts[len(groups)] = vector
            groups.append([hit])
    return [dataclasses.replace(first, duplicates=tuple(rest)) for first, *rest in groups]
