"""Searches in stages (a funnel), each with fewer segments and more granularities.

1. sentence-video (Eq. 3) of every segment: one inner product each, float16 vectors in memory;
2. + video-word (Eq. 4, 8) of the best `candidates`, which needs no frames;
3. the full model (Eq. 14) on the best `rerank`, whose frames are read from disk.

The stages of granularities that a model does not have are skipped. Every stage has a fixed shape,
so nothing is compiled between queries.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import faiss
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from xclip_jax.inference import apply_model, similarity_in_blocks
from xclip_jax.models.xclip import XClip, normalize
from xclip_jax.search.store import Snapshot, unit_vectors
from xclip_jax.similarity import TextFeatures, VideoFeatures, compute_weights

STAGES = ("sentence-video", "video-word", "reading", "all")
MIN_ATTENTION_BATCH = 16  # segments whose best frames are computed in one call, padded
RowMask = Bool[np.ndarray, " N"]
Rows = Int[np.ndarray, " n"]
Scores = Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Hit:
    """A segment in the results of a search.

    Attributes:
        rank: position in the results, from 1.
        score: the model's logit; for queries by example see `Index.similar`.
        id: the segment's id, 16 hexadecimal digits.
        path: its video file.
        start, end: of the segment, seconds after the file's first frame.
        second: time of the frame that AOSM weights most for the query, on the same clock.
    """

    rank: int
    score: float
    id: str
    path: str
    start: float
    end: float
    second: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of a search, usable like a list of Hit.

    Attributes:
        hits: at most k, best first.
        seconds: time of each stage, by its name.
        searched: number of segments that passed the filters.
        note: a note for the user, e.g. that the sentence was truncated, or None.
    """

    hits: list[Hit]
    seconds: dict[str, float]
    searched: int
    note: str | None = None

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, index: int) -> Hit:
        return self.hits[index]


@dataclasses.dataclass(frozen=True)
class Attention:
    """AOSM's attention over the W words of a sentence and the F frames of a segment.

    Attributes:
        words: W tokens.
        times: F seconds after the file's first frame.
        weights_WxF: weights, summing to 1.
    """

    words: list[str]
    times: list[float]
    weights_WxF: Float[np.ndarray, "W F"]


@dataclasses.dataclass(frozen=True)
class Funnel:
    """A model and the widths of the stages.

    Attributes:
        model: the linen module.
        params: its parameters.
        candidates: number of segments that sentence-video passes on to video-word.
        rerank: number of segments scored by the full model.
        normalize: True to L2-normalise video and frame vectors first, if the head keeps raw ones.
    """

    model: XClip
    params: Any
    candidates: int = 5000
    rerank: int = 200
    normalize: bool = False

    @functools.cached_property
    def word_model(self) -> XClip | None:
        """The model with only the granularities that need no frames, or None without video-word."""
        config = self.model.config
        if not config.has_granularities or "video_word" not in config.granularities:
            return None
        names = ("video_sentence", "video_word")
        granularities = tuple(name for name in names if name in config.granularities)
        return XClip(dataclasses.replace(config, granularities=granularities))

    def search(
        self, snapshot: Snapshot, text: TextFeatures, k: int, allowed: RowMask | None = None
    ) -> Answer:
        """Searches the rows where `allowed` is True, None = all, for one sentence."""
        searched = len(snapshot) if allowed is None else int(allowed.sum())
        if not searched:
            return Answer([], {}, 0)
        stopwatch = Stopwatch()
        rerank = self._rerank_width(min(k, len(snapshot)))
        word_model = self.word_model
        width = max(self.candidates, rerank) if word_model else rerank
        rows = self._nearest_rows(snapshot, text, width, allowed)
        stopwatch.lap("sentence-video")
        if word_model is not None and len(rows) > rerank:
            scores = self._score_by_words(word_model, snapshot.vectors_NxD[rows], text, width)
            rows = rows[top_indices(scores, rerank)]
        stopwatch.lap("video-word")
        video = snapshot.features(rows)
        stopwatch.lap("reading")
        scores = self._score(text, video, rerank)
        order = top_indices(scores, k)
        frames = self._best_frames(text, jax.tree.map(lambda x: x[order], video))
        hits = _make_hits(snapshot, rows[order], scores[order], frames)
        stopwatch.lap("all")
        return Answer(hits, stopwatch.seconds, searched)

    def search_exhaustively(
        self,
        snapshot: Snapshot,
        text: TextFeatures,
        k: int,
        *,
        allowed: RowMask | None = None,
        bar: tqdm | None = None,
    ) -> list[Answer]:
        """Scores all allowed rows by the full model for each of T sentences (not for examples).

        `bar` is a progress bar over segments.
        """
        num_texts, started = len(text.mask), time.perf_counter()
        searched = len(snapshot) if allowed is None else int(allowed.sum())
        rows_TxK = np.zeros((num_texts, 0), int)
        scores_TxK = np.zeros((num_texts, 0), np.float32)
        for rows, video in snapshot.blocks():
            num_rows = len(rows)
            if allowed is not None:
                mask = allowed[rows]
                rows, video = rows[mask], jax.tree.map(lambda x, mask=mask: x[mask], video)
            if len(rows):
                sim_TxV = similarity_in_blocks(self.model, self.params, text, video)
                rows_TxK = np.concatenate([rows_TxK, np.broadcast_to(rows, sim_TxV.shape)], 1)
                scores_TxK = np.concatenate([scores_TxK, sim_TxV], 1)
                order_TxK = np.stack([top_indices(scores, k) for scores in scores_TxK])
                rows_TxK = np.take_along_axis(rows_TxK, order_TxK, 1)
                scores_TxK = np.take_along_axis(scores_TxK, order_TxK, 1)
            if bar is not None:
                bar.update(num_rows)
        seconds = {"all": time.perf_counter() - started}
        answers = []
        for index, (rows, scores) in enumerate(zip(rows_TxK, scores_TxK, strict=True)):
            sentence = jax.tree.map(lambda x, index=index: x[index : index + 1], text)
            frames = self._best_frames(sentence, snapshot.features(rows)) if len(rows) else rows
            answers.append(Answer(_make_hits(snapshot, rows, scores, frames), seconds, searched))
        return answers

    def _rerank_width(self, k: int) -> int:
        """Returns `rerank`, or the next power of two if k is larger."""
        return self.rerank if k <= self.rerank else 1 << (k - 1).bit_length()

    def _nearest_rows(
        self, snapshot: Snapshot, text: TextFeatures, width: int, allowed: RowMask | None
    ) -> Rows:
        """Returns the rows of largest sentence-video similarity, best first."""
        vector = apply_model(self.params, text, model=self.model, method=sentence_vector)
        options = {}
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            # faiss's type stubs describe the C++ constructors.
            selector = faiss.IDSelectorBitmap(bits)  # pyright: ignore[reportCallIssue]
            options["params"] = faiss.SearchParameters(sel=selector)  # pyright: ignore[reportCallIssue]
        count = min(width, len(snapshot))
        _, rows = snapshot.vector_index.search(np.asarray(vector), count, **options)
        return rows[0][rows[0] >= 0]

    def _score_by_words(
        self, word_model: XClip, vectors: Float[np.ndarray, "n D"], text: TextFeatures, width: int
    ) -> Scores:
        """Returns the scores of the granularities without frames."""
        mask = np.ones((width, word_model.config.max_frames), bool)
        video = VideoFeatures(_pad(vectors, width), np.zeros((*mask.shape, 0), np.float32), mask)
        scores = apply_model(self.params, text, video, model=word_model, method="similarity")
        return np.asarray(scores)[0, : len(vectors)]

    def _score(self, text: TextFeatures, video: VideoFeatures, width: int) -> Scores:
        """Returns the full model's scores of one sentence with n <= `width` videos."""
        count = len(video.mask)
        if self.normalize:
            vectors, frames = (unit_vectors(np.asarray(x)) for x in (video.video, video.frames))
            video = VideoFeatures(vectors, frames, video.mask)
        video = jax.tree.map(lambda x: _pad(x, width), video)
        scores = apply_model(self.params, text, video, model=self.model, method="similarity")
        return np.asarray(scores)[0, :count]

    def _best_frames(self, text: TextFeatures, video: VideoFeatures) -> Rows:
        """Returns the index of the frame with the most attention in each of n videos."""
        count = len(video.mask)
        width = max(MIN_ATTENTION_BATCH, 1 << (count - 1).bit_length())
        video = jax.tree.map(lambda x: _pad(x, width), video)
        weights = apply_model(self.params, text, video, model=self.model, method=frame_attention)
        return np.asarray(weights)[:count].argmax(1)


def make_example_funnel(funnel: Funnel) -> Funnel:
    """Returns a Funnel for a video or still image in place of a sentence.

    The example's vector is compared with videos and frames like a sentence (Eq. 3, 5, 8).
    """
    config = dataclasses.replace(
        funnel.model.config,
        head="xclip",
        granularities=("video_sentence", "frame_sentence"),
        fusion="mean",
        matrices=False,
    )
    return dataclasses.replace(funnel, model=XClip(config), normalize=True)


def sentence_vector(model: XClip, text: TextFeatures) -> Float[jax.Array, "T D"]:
    """Returns vectors whose inner products with those of videos are Eq. 3, not scaled."""
    matrix = model.matrices().get("video_sentence")
    return normalize(text.sentence) if matrix is None else jnp.asarray(text.sentence) @ matrix


def frame_attention(
    model: XClip, text: TextFeatures, video: VideoFeatures
) -> Float[jax.Array, "V F"]:
    """Returns AOSM's weights of the frames of V videos for one text (T = 1), 0 where masked.

    The mean of the weights in frame-sentence (Eq. 7) and in frame-word (Eq. 9-13), of those that
    the model has. If it has neither: the softmax of the cosines with the sentence.
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
        weights.append(compute_weights(scores_VxF, mask_VxF, 1, config.tau, matrix))
    return jnp.where(video.mask, sum(weights) / len(weights), 0)


def make_example_query(vector_D: Float[np.ndarray, " D"], max_words: int) -> TextFeatures:
    """Returns TextFeatures whose only sentence is the vector of a video."""
    words = np.zeros((1, max_words, len(vector_D)), np.float32)
    return TextFeatures(unit_vectors(vector_D[None]), words, np.arange(max_words)[None] < 2)


def make_hit(
    snapshot: Snapshot, row: int, rank: int = 0, score: float = 0.0, frame: int = 0
) -> Hit:
    """Returns the Hit of a row, whose best second is the time of `frame`."""
    return Hit(
        rank=rank,
        score=score,
        id=snapshot.ids[row].as_py(),
        path=snapshot.paths[row].as_py(),
        start=float(snapshot.starts[row]),
        end=float(snapshot.ends[row]),
        second=float(snapshot.times[row, frame]),
    )


def top_indices(scores: Scores, k: int) -> Int[np.ndarray, " k"]:
    """Returns the indices of the k largest scores, in a stable descending order."""
    return np.argsort(-scores, kind="stable")[:k]


class Stopwatch:
    """Times of consecutive stages.

    Attributes:
        seconds: {stage: duration}.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage that began at the previous call or at construction."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


def _make_hits(snapshot: Snapshot, rows: Rows, scores: Scores, frames: Rows) -> list[Hit]:
    ranks = range(1, len(rows) + 1)
    columns = zip(rows.tolist(), ranks, scores.tolist(), frames.tolist(), strict=True)
    return [make_hit(snapshot, *values) for values in columns]


def _pad(array: np.ndarray, size: int) -> np.ndarray:
    """Appends zeros (False) up to `size` rows."""
    return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])
