"""Searches in stages (a funnel), each with fewer segments and more granularities.

1. sentence-video (Eq. 3) of every segment: one inner product each, float16 vectors in memory;
2. + video-word (Eq. 4, 7) of the best `candidates`, which needs no frames;
3. the full model (Eq. 14) on the best `rerank`, whose frames are read from disk.

In an index with a bank of captions, each stage ranks by its score minus the segment's hubness bias.
The stages of granularities that a model does not have are skipped. Every stage has a fixed shape,
so nothing is compiled between queries. All parts of an index are asked in each stage, and the best
of them are passed on: an index in several parts has the ranking of one in one part.
"""

import dataclasses
import time

import numpy as np

from xclip_jax import inference
from xclip_jax.inference import next_power_of_two
from xclip_jax.search.moments import Curves, FrameMask
from xclip_jax.search.row_ids import RowIds
from xclip_jax.search.selection import Selection
from xclip_jax.search.shard import Scored, Scorer, Scores, Segments
from xclip_jax.search.shards import Shards
from xclip_jax.search.vectors import Rows
from xclip_jax.similarity import TextFeatures

STAGES = ("sentence-video", "video-word", "all")
FURTHER = 99  # number of a block, see `Ranking`
_NO_ROWS = np.array([], np.int64)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Segments with the similarities of their frames.

    They are in blocks of 1, 1, 2, 4, ... times `Funnel.rerank` rows, as the stages before the last
    one chose them, and in the order of score minus bias in each block. So a longer ranking begins
    with a shorter one. Block FURTHER, at the end, has the rows that were only asked for.
    """

    rows: RowIds  # n row ids
    segments: Segments  # what hits are made of, in any order
    blocks: Rows  # n numbers of blocks, from 0
    scores: Scores  # n logits
    biases: Scores  # n logits, zeros for a query by example
    similarities_nxF: Curves  # cosines of frames with the sentence (Eq. 5), see `smooth`
    mask_nxF: FrameMask  # True = a real frame
    seconds: dict[str, float]  # time of each stage, by its name
    searched: int  # number of segments that passed the filters


@dataclasses.dataclass(frozen=True)
class Funnel:
    """A model and the widths of the stages."""

    scorer: Scorer
    candidates: int = 5000  # segments that sentence-video passes on to video-word
    rerank: int = 200  # segments scored by the full model

    def of_examples(self) -> "Funnel":
        """Returns the funnel of queries by example."""
        return dataclasses.replace(self, scorer=self.scorer.of_examples)

    def rank(
        self,
        shards: Shards,
        selection: Selection,
        text: TextFeatures,
        depth: int,
        *,
        further: RowIds = _NO_ROWS,
    ) -> Ranking:
        """Ranks the selected rows for one sentence, or for an example.

        Args:
            shards: the index.
            selection: rows to search.
            text: the query, T = 1.
            depth: number of rows of interest; more than `rerank` widen the last stage.
            further: additional rows to score in the last stage.
        """
        times, by_example = [time.perf_counter()], self.scorer.by_example
        vector_1xD = self.scorer.sentence_vector(text)
        words, candidates = self.scorer.word_model, max(self.candidates, self.rerank)
        # More rows than there are make no wider stage.
        rerank = self.rerank * next_power_of_two(-(-depth // self.rerank))
        width = max(candidates, rerank) if words else rerank
        nearest = shards.nearest(selection, vector_1xD, width, by_example)
        rows = nearest.rows
        times.append(time.perf_counter())
        if words and len(rows) > self.rerank:
            rows, rest = np.split(rows, [candidates])
            scores = shards.score_words(rows, text)
            rows = np.concatenate([rows[np.argsort(-scores, kind="stable")], rest])[:rerank]
        times.append(time.perf_counter())
        blocks = self._blocks(len(rows))
        if len(further):
            others = np.setdiff1d(further, rows)
            rows = np.concatenate([rows, others])
            blocks = np.append(blocks, np.full(len(others), FURTHER))
        scored = shards.score(rows, text, by_example)
        ranking = _order(scored, blocks, scored.scores, searched=nearest.searched)
        times.append(time.perf_counter())
        seconds = dict(zip(STAGES, np.diff(times).tolist(), strict=True))
        return dataclasses.replace(ranking, seconds=seconds)

    def rank_exhaustively(
        self,
        shards: Shards,
        selection: Selection,
        text: TextFeatures,
        depth: int,
        *,
        further: RowIds = _NO_ROWS,
    ) -> list[Ranking]:
        """Scores all selected rows by the full model for each of T sentences (not for examples).

        Returns the best `depth` rows, at least `rerank`, and `further` ones, for each sentence.
        """
        started = time.perf_counter()
        rows, sim_TxN = shards.score_all(selection, text)
        seconds, biases = {"all": time.perf_counter() - started}, shards.biases(rows)
        rankings = []
        for index, scores in enumerate(sim_TxN):
            order = np.argsort(biases - scores, kind="stable")[: max(depth, self.rerank)]
            blocks = self._blocks(len(order))
            others = np.setdiff1d(np.searchsorted(rows, further), order)
            order = np.concatenate([order, others])
            blocks = np.append(blocks, np.full(len(others), FURTHER))
            scored = shards.score(rows[order], inference.slice_rows(text, index), False)
            ranking = _order(scored, blocks, scores[order], searched=len(rows))
            rankings.append(dataclasses.replace(ranking, seconds=seconds))
        return rankings

    def _blocks(self, count: int) -> Rows:
        """Returns the numbers of the blocks of `count` rows, see `Ranking`."""
        places = np.maximum(np.arange(count) / self.rerank, 0.5)
        return np.floor(np.log2(places)).astype(int) + 1


def _order(scored: Scored, blocks: Rows, scores: Scores, *, searched: int) -> Ranking:
    """Returns the ranking of n rows by their blocks and scores minus biases."""
    order = np.lexsort((scored.biases - scores, blocks))
    return Ranking(
        scored.segments.rows[order],
        scored.segments,
        blocks[order],
        scores[order],
        scored.biases[order],
        scored.similarities_nxF[order],
        scored.mask_nxF[order],
        seconds={},
        searched=searched,
    )
