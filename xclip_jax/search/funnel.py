"""From a query to the best segments: granularity by granularity, ever fewer candidates.

1. sentence-video (Eq. 3) with every segment: one inner product each, float16 vectors in memory;
2. + video-word (Eq. 4, 8) with the best `candidates`: needs no frames;
3. the whole model (Eq. 14) with the best `rerank`: their frames are read from disk.

A model without a granularity leaves its stage out. Every stage has a fixed shape: nothing is
compiled between queries.
"""

import dataclasses
import functools
import time
from typing import NamedTuple

import faiss
import jax
import numpy as np

from xclip_jax.inference import apply_model, similarity_in_blocks
from xclip_jax.search.store import unit_vectors
from xclip_jax.similarity import TextFeatures, VideoFeatures

FEW = 16  # hits whose best frames are looked for at once, if no more are asked for
STAGES = ("sentence-video", "video-word", "reading", "all")


class Found(NamedTuple):
    """The n best rows of a snapshot, best first.

    Attributes:
        rows: n ints. scores: n logits.
        moments: of each row the time of the frame that AOSM weighs most, in seconds.
        seconds: what each stage took, by its name in STAGES.
    """

    rows: np.ndarray
    scores: np.ndarray
    moments: np.ndarray
    seconds: dict


@dataclasses.dataclass(frozen=True)
class Funnel:
    """How queries are answered.

    Attributes:
        model: linen module. params: its parameters.
        candidates: segments that sentence-video hands on to video-word.
        rerank: segments that are scored by the whole model.
        unit: whether videos and frames are L2-normalised first, where the head takes raw ones.
    """

    model: object
    params: object
    candidates: int = 5000
    rerank: int = 200
    unit: bool = False

    @functools.cached_property
    def word_model(self):
        """The model with the granularities that need no frames; None: it has no video-word."""
        if self.model.fusion != "mean" or "video_word" not in self.model.granularities:
            return None
        names = ("video_sentence", "video_word")
        kept = tuple(name for name in names if name in self.model.granularities)
        return self.model.clone(granularities=kept)

    def search(self, snapshot, text, k, allowed=None):
        """Found: at most k of the rows where `allowed` (N bool, None = all) is True.

        Args:
            text: TextFeatures of one sentence.
        """
        if not len(snapshot) or (allowed is not None and not allowed.any()):
            return Found(np.zeros(0, int), np.zeros(0), np.zeros(0), {})
        watch = Stopwatch()
        rerank = self._rerank(min(k, len(snapshot)))
        word_model = self.word_model
        width = max(self.candidates, rerank) if word_model else rerank
        rows = self._nearest(snapshot, text, width, allowed)
        watch("sentence-video")
        if word_model is not None and len(rows) > rerank:
            scores = self._by_words(word_model, snapshot, text, rows, width)
            rows = rows[best(scores, rerank)]
        watch("video-word")
        video = snapshot.features(rows)
        watch("reading")
        scores = self._by_all(text, video, rerank)
        order = best(scores, k)
        frames = self._best_frames(text, jax.tree.map(lambda x: x[order], video))
        moments = snapshot.times[rows[order], frames]
        watch("all")
        return Found(rows[order], scores[order], moments, watch.seconds)

    def exhaustive(self, snapshot, text, k, allowed=None, bar=None):
        """For each of T sentences (not examples) the Found of the model's scores with all rows.

        Args:
            text: TextFeatures.
            bar: optional progress bar, moved on by the segments done.
        """
        num_texts, started = len(text.mask), time.perf_counter()
        rows = np.zeros((num_texts, 0), int)
        scores = np.zeros((num_texts, 0), np.float32)
        for block, video in snapshot.blocks():
            size = len(block)
            if allowed is not None:
                keep = allowed[block]
                block, video = block[keep], jax.tree.map(lambda x, keep=keep: x[keep], video)
            if len(block):
                new = similarity_in_blocks(self.model, self.params, text, video)
                rows = np.concatenate([rows, np.broadcast_to(block, new.shape)], 1)
                scores = np.concatenate([scores, new], 1)
                order = np.stack([best(row, k) for row in scores])
                rows, scores = (np.take_along_axis(x, order, 1) for x in (rows, scores))
            if bar is not None:
                bar.update(size)
        seconds = {"all": time.perf_counter() - started}
        return [
            Found(rows[t], scores[t], self._moments_of(text, t, snapshot, rows[t]), seconds)
            for t in range(num_texts)
        ]

    def _rerank(self, k):
        """How many to score by the whole model: more only if more are asked for."""
        return self.rerank if k <= self.rerank else 1 << (k - 1).bit_length()

    def _nearest(self, snapshot, text, width, allowed):
        """The rows with the largest sentence-video similarity, best first."""
        vector = apply_model(self.params, text, model=self.model, method="search_vector")
        options = {}
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            options["params"] = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        _, rows = snapshot.flat.search(np.asarray(vector), min(width, len(snapshot)), **options)
        return rows[0][rows[0] >= 0]

    def _by_words(self, word_model, snapshot, text, rows, width):
        vectors, shape = _padded(snapshot.halves[rows], width), (width, word_model.max_frames)
        video = VideoFeatures(vectors, np.zeros((*shape, 0), np.float32), np.ones(shape, bool))
        scores = apply_model(self.params, text, video, model=word_model, method="similarity")
        return np.asarray(scores)[0, : len(rows)]

    def _by_all(self, text, video, width):
        """Scores of one sentence with at most `width` videos."""
        count, video = len(video.mask), _unit(video) if self.unit else video
        video = jax.tree.map(lambda x: _padded(x, width), video)
        scores = apply_model(self.params, text, video, model=self.model, method="similarity")
        return np.asarray(scores)[0, :count]

    def _best_frames(self, text, video):
        """Of each video the number of the frame that AOSM weighs most for one sentence."""
        count = len(video.mask)
        width = max(FEW, 1 << (count - 1).bit_length())
        video = jax.tree.map(lambda x: _padded(x, width), video)
        weights = apply_model(self.params, text, video, model=self.model, method="frame_attention")
        return np.asarray(weights)[:count].argmax(1)

    def _moments_of(self, text, index, snapshot, rows):
        if not len(rows):
            return np.zeros(0)
        one = jax.tree.map(lambda x: x[index : index + 1], text)
        return snapshot.times[rows, self._best_frames(one, snapshot.features(rows))]


def example_funnel(funnel):
    """The Funnel for a video or still in place of a sentence.

    Its vector is compared as a sentence's is, with videos and their frames (Eq. 3, 5, 8): two
    granularities of the same kind of vectors, whatever head the model has.
    """
    granularities = ("video_sentence", "frame_sentence")
    model = funnel.model.clone(granularities=granularities, fusion="mean", matrices=False)
    return dataclasses.replace(funnel, model=model, unit=True)


def example_text(vector_D, max_words):
    """TextFeatures that hold the vector of a video as their only sentence."""
    words = np.zeros((1, max_words, len(vector_D)), np.float32)
    return TextFeatures(unit_vectors(vector_D[None]), words, np.arange(max_words)[None] < 2)


def _unit(video):
    return VideoFeatures(unit_vectors(video.video), unit_vectors(video.frames), video.mask)


def best(scores, k):
    """Places of the k largest scores, the largest first; of equals the first."""
    return np.argsort(-scores, kind="stable")[:k]


class Stopwatch:
    """`seconds[name]`: from the call before (or the start) to the call with that name."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def __call__(self, name):
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _padded(array, size):
    """`array` with zeros (False) up to `size` rows."""
    return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])
