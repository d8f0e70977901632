"""Searches in stages (a funnel), each with fewer segments and more granularities.

1. sentence-video (Eq. 3) of every segment: one inner product each, float16 vectors in memory;
2. + video-word (Eq. 4, 7) of the best `candidates`, which needs no frames;
3. the full model (Eq. 14) on the best `rerank`, whose frames are read from disk.

In an index with a bank of captions, each stage ranks by its score minus the segment's hubness bias.
The stages of granularities that a model does not have are skipped. Every stage has a fixed shape,
so nothing is compiled between queries.
"""

import dataclasses
import functools
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from xclip_jax import inference
from xclip_jax.cli import progress
from xclip_jax.inference import apply_model, next_power_of_two, pad_rows
from xclip_jax.models.xclip import XClip, normalize
from xclip_jax.retriever import Retriever
from xclip_jax.search.moments import Curves, FrameMask, smooth
from xclip_jax.search.snapshot import Rows, Selection, Snapshot, unit_vectors
from xclip_jax.similarity import AnyArray, TextFeatures, VideoFeatures

STAGES = ("sentence-video", "video-word", "reading", "all")
FURTHER = 99  # number of a block, see `Ranking`
EXHAUSTIVE_BATCH = 1024  # segments read and scored at once by an exhaustive search
# Model fields with which the vector of a video or image is compared like a sentence (Eq. 3, 5, 8).
_EXAMPLE_FIELDS: dict[str, Any] = {"head": "xclip", "fusion": "mean", "matrices": False}
_EXAMPLE_FIELDS |= {"granularities": ("video_sentence", "frame_sentence")}
Scores = Float[np.ndarray, " n"]
_NO_ROWS = np.array([], int)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Segments with the similarities of their frames.

    They are in blocks of 1, 1, 2, 4, ... times `Funnel.rerank` rows, as the stages before the last
    one chose them, and in the order of score minus bias in each block. So a longer ranking begins
    with a shorter one. Block FURTHER, at the end, has the rows that were only asked for.
    """

    rows: Rows  # n rows of the snapshot
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

    model: XClip
    params: Any
    candidates: int = 5000  # segments that sentence-video passes on to video-word
    rerank: int = 200  # segments scored by the full model
    # True: the query is the vector of a video or image. Stored vectors, which may be raw ones, are
    # L2-normalised first. The hubness bias is not subtracted: it is one of texts.
    by_example: bool = False

    @functools.cached_property
    def word_model(self) -> XClip | None:
        """The model with only the granularities that need no frames, or None without video-word."""
        config = self.model.config
        if not config.has_granularities or "video_word" not in config.granularities:
            return None
        names = tuple(name for name in config.granularities if name.startswith("video"))
        return XClip(dataclasses.replace(config, granularities=names))

    def example(self, vector_1xD: Float[AnyArray, "1 D"]) -> tuple["Funnel", TextFeatures]:
        """Returns (funnel, query) to search by the vector of a video or image."""
        config = dataclasses.replace(self.model.config, **_EXAMPLE_FIELDS)
        sentence_1xD, mask_W = unit_vectors(np.asarray(vector_1xD)), np.arange(config.max_words) < 2
        words = np.zeros((1, config.max_words, sentence_1xD.shape[1]), np.float32)
        query = TextFeatures(sentence_1xD, words, mask_W[None])
        return dataclasses.replace(self, model=XClip(config), by_example=True), query

    def rank(
        self, selection: Selection, text: TextFeatures, depth: int, *, further: Rows = _NO_ROWS
    ) -> Ranking:
        """Ranks the selected rows for one sentence, or for an example.

        Args:
            selection: rows to search.
            text: the query, T = 1.
            depth: number of rows of interest; more than `rerank` widen the last stage.
            further: additional rows to score in the last stage.
        """
        snapshot, searched = selection.snapshot, len(selection)
        times, depth = [time.perf_counter()], min(depth, len(snapshot))
        rerank = self.rerank * next_power_of_two(-(-depth // self.rerank))
        width = max(self.candidates, rerank) if self.word_model else rerank
        vector_1xD = apply_model(self.params, text, model=self.model, method=sentence_vector)
        # A Transformer's scores and their biases do not have the unit of the first stage's cosines.
        subtract_bias = self.model.config.has_granularities and not self.by_example
        options: Any = {"subtract_bias": subtract_bias}
        rows = snapshot.nearest_rows(np.asarray(vector_1xD), width, selection.rows, **options)
        times.append(time.perf_counter())
        if self.word_model and len(rows) > self.rerank:
            candidates = max(self.candidates, self.rerank)
            rows, rest = np.split(rows, [candidates])
            mask = np.ones((len(rows), self.model.config.max_frames), bool)
            no_frames = np.zeros((*mask.shape, 0), np.float32)
            video = VideoFeatures(snapshot.vectors_NxD[rows], no_frames, mask)
            scores = self._score(self.word_model, text, video, candidates)
            scores = scores - self._biases(snapshot, rows)
            order = np.argsort(-scores, kind="stable")
            rows = np.concatenate([rows[order], rest])[:rerank]
        times.append(time.perf_counter())
        blocks = self._blocks(len(rows))
        if len(further):
            others = np.setdiff1d(further, rows)
            rows = np.concatenate([rows, others])
            blocks = np.append(blocks, np.full(len(others), FURTHER))
        video = snapshot.features(rows)
        times.append(time.perf_counter())
        if self.by_example:
            vectors, frames = (unit_vectors(np.asarray(x)) for x in (video.video, video.frames))
            video = VideoFeatures(vectors, frames, video.mask, video.weights)
        scores = self._score(self.model, text, video, self.rerank)
        ranking = self._order(snapshot, rows, blocks, scores, text, video)
        times.append(time.perf_counter())
        seconds = dict(zip(STAGES, np.diff(times).tolist(), strict=True))
        return dataclasses.replace(ranking, seconds=seconds, searched=searched)

    def rank_exhaustively(
        self, selection: Selection, text: TextFeatures, depth: int, *, further: Rows = _NO_ROWS
    ) -> list[Ranking]:
        """Scores all selected rows by the full model for each of T sentences (not for examples).

        Returns the best `depth` rows, at least `rerank`, and `further` ones, for each sentence.
        """
        started, snapshot = time.perf_counter(), selection.snapshot
        everything = np.arange(len(snapshot))
        rows = everything if selection.rows is None else everything[selection.rows]
        retriever = Retriever({}, self.model, self.params)
        sim_TxN = np.zeros((len(text.mask), len(rows)), np.float32)
        with progress(len(rows), "scoring", "segment") as bar:
            for start in range(0, len(rows), EXHAUSTIVE_BATCH):
                block = slice(start, start + EXHAUSTIVE_BATCH)
                video = snapshot.features(rows[block])
                sim_TxN[:, block] = retriever.similarity(text, video)
                bar.update(len(video.mask))
        facts: Any = {"seconds": {"all": time.perf_counter() - started}, "searched": len(rows)}
        rankings = []
        for index, scores in enumerate(sim_TxN):
            order = np.argsort(self._biases(snapshot, rows) - scores, kind="stable")
            order = order[: max(depth, self.rerank)]
            blocks = self._blocks(len(order))
            others = np.setdiff1d(np.searchsorted(rows, further), order)
            order = np.concatenate([order, others])
            blocks = np.append(blocks, np.full(len(others), FURTHER))
            sentence = inference.slice_rows(text, index)
            options = sentence, snapshot.features(rows[order])
            ranking = self._order(snapshot, rows[order], blocks, scores[order], *options)
            rankings.append(dataclasses.replace(ranking, **facts))
        return rankings

    def _order(
        self, snapshot: Snapshot, rows: Rows, blocks: Rows, scores: Scores, *features: Any
    ) -> Ranking:
        """Returns the ranking of n rows by their blocks and scores.

        `features` are the TextFeatures of the query and the VideoFeatures of the rows.
        """
        text, video = features
        biases = self._biases(snapshot, rows)
        order = np.lexsort((biases - scores, blocks))
        mask_nxF = np.asarray(video.mask)
        sim_nxF = compare_frames(text, video)
        return Ranking(
            rows[order],
            blocks[order],
            scores[order],
            biases[order],
            smooth(sim_nxF, mask_nxF)[order],
            mask_nxF[order],
            seconds={},
            searched=len(rows),
        )

    def _blocks(self, count: int) -> Rows:
        """Returns the numbers of the blocks of `count` rows, see `Ranking`."""
        places = np.maximum(np.arange(count) / self.rerank, 0.5)
        return np.floor(np.log2(places)).astype(int) + 1

    @functools.cached_property
    def _scale(self) -> float:
        return Retriever({}, self.model, self.params).scale

    def _biases(self, snapshot: Snapshot, rows: Rows) -> Scores:
        """Returns the hubness biases of n rows as logits, zeros for a query by example."""
        return (0 if self.by_example else self._scale) * snapshot.biases[rows]

    def _score(self, model: XClip, text: TextFeatures, video: VideoFeatures, width: int) -> Scores:
        """Returns the scores of one sentence with n videos, `width` at a time, with padding."""
        scores = []
        for start in range(0, len(video.mask), width):
            part = pad_rows(inference.slice_rows(video, start, width), width)
            sim_1xV = apply_model(self.params, text, part, model=model, method="similarity")
            scores.append(np.asarray(sim_1xV)[0])
        return np.concatenate(scores)[: len(video.mask)]


def sentence_vector(model: XClip, text: TextFeatures) -> Float[Array, "T D"]:
    """Returns vectors whose inner products with those of videos are Eq. 3, not scaled."""
    matrix = model.matrices().get("video_sentence")
    return normalize(text.sentence) if matrix is None else jnp.asarray(text.sentence) @ matrix


def compare_frames(text: TextFeatures, video: VideoFeatures) -> Curves:
    """Returns the cosines of the frames of V videos with one sentence (Eq. 5), T = 1."""
    sentence_D = unit_vectors(np.asarray(text.sentence)[0])
    return unit_vectors(np.asarray(video.frames)) @ sentence_D
