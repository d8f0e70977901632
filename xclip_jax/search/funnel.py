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
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from xclip_jax import inference
from xclip_jax.cli import progress
from xclip_jax.inference import apply_model, next_power_of_two, pad_rows
from xclip_jax.models.xclip import XClip, normalize
from xclip_jax.retriever import Retriever
from xclip_jax.search.snapshot import Rows, Selection, Snapshot, unit_vectors
from xclip_jax.similarity import AnyArray, TextFeatures, VideoFeatures, compute_weights

STAGES = ("sentence-video", "video-word", "reading", "all")
MIN_ATTENTION_BATCH = 16  # segments whose best frames are computed in one call, padded
EXHAUSTIVE_BATCH = 1024  # segments read and scored at once by an exhaustive search
# Model fields with which the vector of a video or image is compared like a sentence (Eq. 3, 5, 8).
_EXAMPLE_FIELDS: dict[str, Any] = {"head": "xclip", "fusion": "mean", "matrices": False}
_EXAMPLE_FIELDS |= {"granularities": ("video_sentence", "frame_sentence")}
Scores = Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Hit:
    """A segment in the results of a search. All times are seconds after the file's first frame."""

    rank: int  # position in the results, from 1
    score: float  # the model's logit; for queries by example see `Index.similar`
    id: str  # of the segment, 16 hexadecimal digits
    path: str  # of its video file
    start: float
    end: float
    second: float  # time of the frame that AOSM weights most for the query
    offset: float = 0.0  # from the start of the file, as players count, to its first frame
    bias: float = 0.0  # hubness bias as a logit: results are ranked by score - bias


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of a search, usable like a list of Hit."""

    hits: list[Hit]  # at most k, best first
    seconds: dict[str, float]  # time of each stage, by its name
    searched: int  # number of segments that passed the filters
    note: str | None = None  # for the user, e.g. that the sentence was truncated

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, index: int) -> Hit:
        return self.hits[index]


@dataclasses.dataclass(frozen=True)
class Attention:
    """AOSM's attention over the W words of a sentence and the F frames of a segment."""

    words: list[str]  # W tokens
    times: list[float]  # F seconds after the file's first frame
    weights_WxF: Float[np.ndarray, "W F"]  # with the sum 1


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

    def search(self, selection: Selection, text: TextFeatures, k: int) -> Answer:
        """Searches the selected rows for one sentence."""
        snapshot, searched = selection.snapshot, len(selection)
        if not searched:
            return Answer([], {}, 0)
        times, k = [time.perf_counter()], min(k, len(snapshot))
        rerank = self.rerank if k <= self.rerank else next_power_of_two(k)
        width = max(self.candidates, rerank) if self.word_model else rerank
        vector_1xD = apply_model(self.params, text, model=self.model, method=sentence_vector)
        # A Transformer's scores and their biases do not have the unit of the first stage's cosines.
        subtract_bias = self.model.config.has_granularities and not self.by_example
        options: Any = {"subtract_bias": subtract_bias}
        rows = snapshot.nearest_rows(np.asarray(vector_1xD), width, selection.rows, **options)
        times.append(time.perf_counter())
        if self.word_model and len(rows) > rerank:
            mask = np.ones((len(rows), self.model.config.max_frames), bool)
            no_frames = np.zeros((*mask.shape, 0), np.float32)
            video = VideoFeatures(snapshot.vectors_NxD[rows], no_frames, mask)
            scores = self._score(self.word_model, text, video, width)
            scores = scores - self._biases(snapshot, rows)
            rows = rows[np.argsort(-scores, kind="stable")[:rerank]]
        times.append(time.perf_counter())
        video = snapshot.features(rows)
        times.append(time.perf_counter())
        if self.by_example:
            vectors, frames = (unit_vectors(np.asarray(x)) for x in (video.video, video.frames))
            video = VideoFeatures(vectors, frames, video.mask, video.weights)
        scores = self._score(self.model, text, video, rerank)
        order = np.argsort(self._biases(snapshot, rows) - scores, kind="stable")[:k]
        video = jax.tree.map(lambda x: x[order], video)
        hits = self._make_hits(selection, rows[order], scores[order], text, video)
        times.append(time.perf_counter())
        return Answer(hits, dict(zip(STAGES, np.diff(times).tolist(), strict=True)), searched)

    def search_exhaustively(self, selection: Selection, text: TextFeatures, k: int) -> list[Answer]:
        """Scores all selected rows by the full model for each of T sentences (not for examples)."""
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
        seconds, answers = {"all": time.perf_counter() - started}, []
        for index, scores in enumerate(sim_TxN if len(rows) else ()):
            order = np.argsort(self._biases(snapshot, rows) - scores, kind="stable")[:k]
            sentence = inference.slice_rows(text, index)
            video = snapshot.features(rows[order])
            hits = self._make_hits(selection, rows[order], scores[order], sentence, video)
            answers.append(Answer(hits, seconds, len(rows)))
        return answers or [Answer([], seconds, 0)] * len(text.mask)

    @functools.cached_property
    def _scale(self) -> float:
        return Retriever({}, self.model, self.params).scale

    def _biases(self, snapshot: Snapshot, rows: Rows) -> Scores:
        """Returns the hubness biases of n rows as logits, zeros for a query by example."""
        return (0 if self.by_example else self._scale) * snapshot.biases[rows]

    def _score(self, model: XClip, text: TextFeatures, video: VideoFeatures, width: int) -> Scores:
        """Returns the scores of one sentence with n videos, computed with padding to `width`."""
        padded = pad_rows(video, width)
        scores = apply_model(self.params, text, padded, model=model, method="similarity")
        return np.asarray(scores)[0, : len(video.mask)]

    def _make_hits(
        self,
        selection: Selection,
        rows: Rows,
        scores: Scores,
        text: TextFeatures,
        video: VideoFeatures,
    ) -> list[Hit]:
        """Returns the Hits of n rows, best first, with the frames that get the most attention."""
        padded = pad_rows(video, max(MIN_ATTENTION_BATCH, next_power_of_two(len(rows))))
        weights = apply_model(self.params, text, padded, model=self.model, method=frame_attention)
        inside = selection.frames(rows, np.asarray(video.mask))
        frames = np.where(inside, np.asarray(weights)[: len(rows)], -1).argmax(1)
        biases = self._biases(selection.snapshot, rows)
        options: Any = {"biases": biases, "interval": selection.interval}
        return make_hits(selection.snapshot, rows, scores, frames, **options)


def sentence_vector(model: XClip, text: TextFeatures) -> Float[Array, "T D"]:
    """Returns vectors whose inner products with those of videos are Eq. 3, not scaled."""
    matrix = model.matrices().get("video_sentence")
    return normalize(text.sentence) if matrix is None else jnp.asarray(text.sentence) @ matrix


def frame_attention(model: XClip, text: TextFeatures, video: VideoFeatures) -> Float[Array, "V F"]:
    """Returns AOSM's weights of the frames of V videos for one text (T = 1), 0 where masked.

    This is the mean of the weights in frame-sentence (Eq. 8) and frame-word (Eq. 9-13), or in the
    one that the model has. A model with neither uses the softmax of cosines with the sentence.
    """
    config = model.config
    granularities = config.granularities if config.has_granularities else ()
    weights = []
    if "frame_word" in granularities:
        weights.append(jnp.sum(model.word_frame_attention(text, video), 1))
    if "frame_sentence" in granularities or not weights:
        scores_VxF = normalize(video.frames) @ normalize(text.sentence[0])
        matrix = model.matrices().get("frame_sentence")
        mask_VxF = model.aosm_frames(video.mask)
        weights.append(compute_weights(scores_VxF, mask_VxF, 1, model.tau(), matrix))
    return jnp.where(video.mask, sum(weights) / len(weights), 0)


def make_hits(
    snapshot: Snapshot,
    rows: Rows,
    scores: Scores,
    frames: Rows,
    *,
    biases: Scores,
    interval: tuple[float, float] = (-np.inf, np.inf),
) -> list[Hit]:
    """Returns the Hits of n rows, best first.

    The best seconds are the times of `frames`, or, outside the interval, its nearest second.
    """
    ids = [snapshot.ids[row].as_py() for row in rows]
    paths = [snapshot.paths[row].as_py() for row in rows]
    best = np.clip(snapshot.times[rows, frames].astype(float), *interval)
    times = snapshot.starts[rows], snapshot.ends[rows], best, snapshot.offsets[rows]
    columns = scores.tolist(), ids, paths, *(column.tolist() for column in (*times, biases))
    return list(map(Hit, itertools.count(1), *columns))
