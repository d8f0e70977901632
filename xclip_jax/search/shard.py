"""Ranks and reads one part of an index, in this process or in one of many.

Rows are named by row ids, which are the same in all parts. A segment's scores depend on that
segment alone, so parts of an index give the scores of the whole.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float

from xclip_jax import inference
from xclip_jax.cli import InputError
from xclip_jax.inference import apply_model, pad_rows
from xclip_jax.models.xclip import XClip, normalize
from xclip_jax.retriever import Retriever
from xclip_jax.search.moments import Curves, FrameMask, Moment, smooth
from xclip_jax.search.results import Hit
from xclip_jax.search.row_ids import RowIds
from xclip_jax.search.selection import Selection
from xclip_jax.search.snapshot import Snapshot
from xclip_jax.search.vectors import Rows, unit_vectors
from xclip_jax.similarity import AnyArray, TextFeatures, VideoFeatures

Scores = Float[np.ndarray, " n"]
# Segments that are scored at once. Products of other shapes are rounded differently, so these are
# the same in an index of one part and in one of many.
WORD_BLOCK, FRAME_BLOCK = 1280, 104
EXHAUSTIVE_BATCH = 1024  # segments read and scored at once by an exhaustive search
# Model fields with which the vector of a video or image is compared like a sentence (Eq. 3, 5, 8).
_EXAMPLE_FIELDS: dict[str, Any] = {"head": "xclip", "fusion": "mean", "matrices": False}
_EXAMPLE_FIELDS |= {"granularities": ("video_sentence", "frame_sentence")}


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model that scores segments.

    `by_example`: True if the query is the vector of a video or image. Stored vectors, which may be
    raw ones, are L2-normalised first. The hubness bias is not subtracted: it is one of texts.
    """

    model: XClip
    params: Any
    by_example: bool = False

    @functools.cached_property
    def word_model(self) -> XClip | None:
        """The model with only the granularities that need no frames, or None without video-word."""
        config = self.model.config
        if not config.has_granularities or "video_word" not in config.granularities:
            return None
        names = tuple(name for name in config.granularities if name.startswith("video"))
        return XClip(dataclasses.replace(config, granularities=names))

    @functools.cached_property
    def of_examples(self) -> "Scorer":
        """The scorer of queries by example."""
        config = dataclasses.replace(self.model.config, **_EXAMPLE_FIELDS)
        return Scorer(XClip(config), self.params, by_example=True)

    @functools.cached_property
    def scale(self) -> float:
        """Number by which cosines are multiplied to become logits."""
        return Retriever({}, self.model, self.params).scale

    @property
    def subtracts_bias(self) -> bool:
        """True if the first stage ranks by the inner product minus the hubness bias.

        A Transformer's scores and their biases do not have the unit of its cosines.
        """
        return self.model.config.has_granularities and not self.by_example

    @property
    def sums_frames(self) -> bool:
        """True if a video vector is the normalised sum of the stored ones of its frames (Eq. 2)."""
        config = self.model.config
        has_frames = config.frame_features != "clip" or config.temporal.type == "none"
        return config.head != "tight_transformer" and not config.vision.num_frames and has_frames

    def make_example(self, vector_1xD: Float[AnyArray, "1 D"]) -> TextFeatures:
        """Returns the vector of a video or image as a query."""
        config = self.model.config
        sentence_1xD, mask_W = unit_vectors(np.asarray(vector_1xD)), np.arange(config.max_words) < 2
        words = np.zeros((1, config.max_words, sentence_1xD.shape[1]), np.float32)
        return TextFeatures(sentence_1xD, words, mask_W[None])

    def sentence_vector(self, text: TextFeatures) -> Float[np.ndarray, "1 D"]:
        """Returns a vector whose inner products with those of videos are Eq. 3, not scaled."""
        vectors = apply_model(self.params, text, model=self.model, method=_sentence_vector)
        return np.asarray(vectors)

    def score(self, model: XClip, text: TextFeatures, video: VideoFeatures, width: int) -> Scores:
        """Returns the scores of one sentence with n videos, `width` at a time, with padding."""
        scores = [np.zeros(0, np.float32)]
        for start in range(0, len(video.mask), width):
            part = pad_rows(inference.slice_rows(video, start, width), width)
            sim_1xV = apply_model(self.params, text, part, model=model, method="similarity")
            scores.append(np.asarray(sim_1xV)[0])
        return np.concatenate(scores)[: len(video.mask)]


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The n nearest rows to a vector."""

    rows: RowIds
    products: Scores  # inner products, minus the biases if these count
    searched: int  # number of rows that were selected


@dataclasses.dataclass(frozen=True)
class Segments:
    """Facts of n segments of which hits are made."""

    rows: RowIds
    ids: Sequence[str]
    paths: Sequence[str]
    starts: Scores  # seconds
    ends: Scores  # seconds
    offsets: Scores  # seconds from the start of the file to its first frame
    durations: Scores  # seconds: ends of the files' last segments
    times_nxF: Curves  # seconds of the frames
    vectors_nxD: np.ndarray  # video vectors

    @functools.cached_property
    def places(self) -> dict[int, int]:
        """{row id: index among the n segments}."""
        return {row: place for place, row in enumerate(self.rows.tolist())}

    def hit(self, row: int, moment: Moment, **fields: Any) -> Hit:
        """Returns a moment of a segment as a Hit of rank 0, with further fields of it."""
        place = self.places[row]
        return Hit(
            rank=0,
            id=self.ids[place],
            path=self.paths[place],
            **vars(moment),
            segment_start=float(self.starts[place]),
            segment_end=float(self.ends[place]),
            duration=float(self.durations[place]),
            offset=float(self.offsets[place]),
            **fields,
        )


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of n segments by the full model."""

    segments: Segments
    scores: Scores  # logits
    biases: Scores  # logits, zeros for a query by example
    similarities_nxF: Curves  # cosines of frames with the sentence (Eq. 5), see `smooth`
    mask_nxF: FrameMask  # True = a real frame


class Shard:
    """One version of a part of an index, and the model that scores its segments."""

    def __init__(self, snapshot: Snapshot, scorer: Scorer) -> None:
        self.snapshot, self._scorer = snapshot, scorer

    def nearest(
        self, selection: Selection, vector_1xD: np.ndarray, count: int, by_example: bool
    ) -> Nearest:
        """Returns the first stage's best rows, at most `count`."""
        subtract = self._choose(by_example).subtracts_bias
        snapshot, options = self.snapshot, {"subtract_bias": subtract}
        rows, products = snapshot.nearest(vector_1xD, count, selection, **options)
        return Nearest(snapshot.row_ids[rows], products, self.count(selection))

    def count(self, selection: Selection) -> int:
        """Returns the number of selected rows."""
        mask = self.snapshot.mask(selection)
        return len(self.snapshot) if mask is None else int(mask.sum())

    def score_words(self, row_ids: RowIds, text: TextFeatures) -> Scores:
        """Returns the second stage's scores minus biases of n rows."""
        rows = self._find(row_ids)
        model = self._scorer.word_model
        assert model is not None
        mask = np.ones((len(rows), model.config.max_frames), bool)
        no_frames = np.zeros((*mask.shape, 0), np.float32)
        video = VideoFeatures(self.snapshot.vectors.take(rows), no_frames, mask)
        scores = self._scorer.score(model, text, video, WORD_BLOCK)
        return scores - self._scorer.scale * self.snapshot.biases(rows)

    def score(self, row_ids: RowIds, text: TextFeatures, by_example: bool) -> Scored:
        """Returns the scores of n rows by the full model, and what their hits are made of."""
        rows, scorer = self._find(row_ids), self._choose(by_example)
        video = self._read(rows)
        if by_example:
            vectors, frames = (unit_vectors(np.asarray(x)) for x in (video.video, video.frames))
            video = VideoFeatures(vectors, frames, video.mask, video.weights)
        scores = scorer.score(scorer.model, text, video, FRAME_BLOCK)
        scale = 0.0 if by_example else scorer.scale
        biases = scale * self.snapshot.biases(rows)
        curves = smooth(compare_frames(text, video), np.asarray(video.mask))
        return Scored(self.segments(row_ids), scores, biases, curves, np.asarray(video.mask))

    def score_all(self, selection: Selection, text: TextFeatures) -> tuple[RowIds, np.ndarray]:
        """Returns the selected rows, and the scores of T sentences with them, T x n."""
        mask = self.snapshot.mask(selection)
        row_ids = self.snapshot.row_ids if mask is None else self.snapshot.row_ids[mask]
        row_ids = np.sort(row_ids)
        retriever = Retriever({}, self._scorer.model, self._scorer.params)
        sim_TxN = np.zeros((len(text.mask), len(row_ids)), np.float32)
        for start in range(0, len(row_ids), EXHAUSTIVE_BATCH):
            block = slice(start, start + EXHAUSTIVE_BATCH)
            video = self._read(self._find(row_ids[block]))
            sim_TxN[:, block] = retriever.similarity(text, video)
        return row_ids, sim_TxN

    def biases(self, row_ids: RowIds) -> Scores:
        """Returns the hubness biases of n rows as logits."""
        rows = self._find(row_ids)
        return self._scorer.scale * self.snapshot.biases(rows)

    def segments(self, row_ids: RowIds) -> Segments:
        """Returns what hits of n rows are made of."""
        snapshot, rows = self.snapshot, self._find(row_ids)
        names = [n for n in ("path", "start", "end", "offset") if n in snapshot.rows.column_names]
        columns = snapshot.rows.select(names).take(rows)
        paths = columns["path"].to_pylist()
        known = "offset" in names
        return Segments(
            rows=row_ids,
            ids=[f"{key:016x}" for key in snapshot.keys[rows].tolist()],
            paths=paths,
            starts=columns["start"].to_numpy(),
            ends=columns["end"].to_numpy(),
            offsets=columns["offset"].to_numpy() if known else np.zeros(len(rows)),
            durations=np.array([snapshot.durations[path] for path in paths], float),
            times_nxF=snapshot.times(rows),
            vectors_nxD=snapshot.vectors.take(rows),
        )

    def durations(self, paths: Sequence[str]) -> Scores:
        """Returns the ends of the last segments of files, 0 for unknown ones."""
        return np.array([self.snapshot.durations.get(path, 0.0) for path in paths], float)

    def rows_of(self, ids: Collection[str], selection: Selection) -> dict[str, int]:
        """Returns {id: row id} of the segments that are selected."""
        rows, mask = self.snapshot.rows_of(ids), self.snapshot.mask(selection)
        row_ids = self.snapshot.row_ids
        return {one: int(row_ids[k]) for one, k in rows.items() if mask is None or mask[k]}

    def films(self) -> pa.Table:
        """Returns the table of the files, see `Snapshot.films`."""
        return self.snapshot.films

    def features(self, row_ids: RowIds) -> VideoFeatures:
        """Reads the VideoFeatures of n rows."""
        return self._read(self._find(row_ids))

    def stamp(self, row_ids: RowIds) -> dict[str, Any]:
        """Reads what is stored of a row's file, see `Snapshot.stamp`."""
        return self.snapshot.stamp(self._find(row_ids))

    def thumbnail(self, row_ids: RowIds) -> bytes:
        """Reads the JPEG thumbnail of a row."""
        return self.snapshot.thumbnail(self._find(row_ids))

    def _find(self, row_ids: RowIds) -> Rows:
        """Returns the rows of row ids, or raises InputError if one is not in this version."""
        rows = self.snapshot.find_row_ids(row_ids)
        if (rows < 0).any():
            raise InputError("a segment is no longer in the index: search again")
        return rows

    def _choose(self, by_example: bool) -> Scorer:
        return self._scorer.of_examples if by_example else self._scorer

    def _read(self, rows: Rows) -> VideoFeatures:
        return self.snapshot.features(rows, sum_frames=self._scorer.sums_frames)


def _sentence_vector(model: XClip, text: TextFeatures) -> Float[Array, "T D"]:
    matrix = model.matrices().get("video_sentence")
    return normalize(text.sentence) if matrix is None else jnp.asarray(text.sentence) @ matrix


def compare_frames(text: TextFeatures, video: VideoFeatures) -> Curves:
    """Returns the cosines of the frames of V videos with one sentence (Eq. 5), T = 1."""
    sentence_D = unit_vectors(np.asarray(text.sentence)[0])
    return unit_vectors(np.asarray(video.frames)) @ sentence_D
