"""Indexes a video collection, and searches it by sentence, video or image."""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import pyarrow as pa
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from xclip_jax.checkpoint import model_folder
from xclip_jax.cli import InputError
from xclip_jax.data.extraction import VIDEO_SUFFIXES
from xclip_jax.evaluate import list_words
from xclip_jax.inference import apply_model, copy_to_local_devices
from xclip_jax.retriever import Retriever, load
from xclip_jax.search.funnel import (
    Answer,
    Attention,
    Funnel,
    Hit,
    RowMask,
    Stopwatch,
    make_example_funnel,
    make_example_query,
    make_hit,
)
from xclip_jax.search.indexing import IndexingSummary, add_files, fingerprint, is_below
from xclip_jax.search.store import Filters, Snapshot, Store
from xclip_jax.similarity import TextFeatures

SEGMENT_SECONDS = 30
PRECISIONS = ("float32", "float16")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
AnyPath = str | os.PathLike


class Index:
    """Segments of videos with their features, and the model that computed them.

    Searching is thread-safe, also while another process adds files: see `refresh`.

    Attributes:
        location, about: see xclip_jax.search.store.Store.
        candidates, rerank: widths of the funnel, see xclip_jax.search.funnel.
    """

    def __init__(
        self, store: Store, model: AnyPath | None = None, candidates: int = 5000, rerank: int = 200
    ) -> None:
        if candidates < 1 or rerank < 1:
            raise InputError(f"candidates = {candidates}, rerank = {rerank}: must be at least 1")
        self.candidates, self.rerank = candidates, rerank
        self.location, self.about = store.location, store.about
        self._store, self._model = store, model
        self._lock = threading.Lock()
        self._snapshot = store.snapshot()

    @classmethod
    def open(
        cls,
        location: AnyPath,
        model: AnyPath | None = None,
        candidates: int = 5000,
        rerank: int = 200,
    ) -> "Index":
        """Opens an existing index.

        Args:
            location: a folder, or the URI of a bucket (s3://, gs://, az://).
            model: a model or work directory; None: the path stored in the index.
            candidates: number of segments scored by the word granularities.
            rerank: number of segments scored by the full model, which reads their frames.

        Raises:
            InputError: there is no index, it is corrupted, or it was made with another model.
        """
        index = cls(Store(location), model, candidates, rerank)
        if model is not None:
            index.retriever  # noqa: B018  (a wrong model must fail here, not at the first query)
        return index

    @classmethod
    def create(
        cls,
        location: AnyPath,
        model: AnyPath,
        *,
        segment_seconds: int = SEGMENT_SECONDS,
        shots: bool = False,
        precision: Literal["float32", "float16"] = "float32",
    ) -> "Index":
        """Creates an empty index.

        Args:
            location: see `open`.
            model: a model or work directory.
            segment_seconds: length of a segment in whole seconds, at least 1.
            shots: True to cut at shot changes, with `segment_seconds` as the maximum length.
            precision: of the stored features; "float16" halves the disk space and changes logits
                by about 0.01.

        Raises:
            InputError: an index exists already, or there is no model.
        """
        if not isinstance(segment_seconds, int) or segment_seconds < 1:
            raise InputError(f"segment_seconds = {segment_seconds}: must be an integer >= 1")
        if precision not in PRECISIONS:
            raise InputError(f"precision = {precision!r}: must be {' or '.join(PRECISIONS)}")
        retriever = load(model)
        about = {
            "model": _absolute_model_folder(model),
            "fingerprint": fingerprint(retriever),
            "max_frames": retriever.model.config.max_frames,
            "embed_dim": retriever.model.config.embed_dim,
            "segment_seconds": segment_seconds,
            "shots": shots,
            "precision": precision,
        }
        return cls(Store.create(location, about), model)

    def __len__(self) -> int:
        return self.num_segments

    @property
    def num_segments(self) -> int:
        """Number of segments in the version that is searched."""
        return len(self._snapshot)

    @property
    def num_files(self) -> int:
        """Number of files in the version that is searched."""
        return self._snapshot.num_files

    @property
    def model_name(self) -> str:
        """Path of the model directory."""
        return self.about["model"] if self._model is None else _absolute_model_folder(self._model)

    @functools.cached_property
    def retriever(self) -> Retriever:
        """The model, loaded on first use.

        Raises InputError if it is missing, or is not the one that the index was made with.
        """
        original = self.about["model"]
        if self._model is None and not Path(original).is_dir():
            raise InputError(
                f"the model of {self.location} is no longer in {original}: set --model to its "
                "new location"
            )
        retriever = load(self.model_name)
        actual = fingerprint(retriever)
        if actual != self.about["fingerprint"]:
            raise InputError(
                f"{self.location} was made with the model {original} "
                f"({self.about['fingerprint']}), not with {self.model_name} ({actual}): vectors of "
                "different models cannot be compared"
            )
        retriever.params = copy_to_local_devices(retriever.params)
        return retriever

    def add(self, videos: AnyPath | Iterable[AnyPath], prune: bool = False) -> IndexingSummary:
        """Adds video files and the video files in folders and their subfolders.

        Unchanged files (same size and modification time) are skipped, changed ones are read again.
        After an interruption, a second call resumes. `prune` removes files that no longer exist
        in these folders. Raises InputError if there is no video.
        """
        summary = add_files(self._store, self.retriever, _to_list(videos), prune=prune)
        self.refresh()
        return summary

    def remove(self, videos: AnyPath | Iterable[AnyPath]) -> int:
        """Removes files and all files below folders, and returns the number of removed segments."""
        self.refresh()
        num_before, videos = self.num_segments, _to_list(videos)
        self._store.remove([path for path in self._store.files() if is_below(path, videos)])
        self.refresh()
        return num_before - self.num_segments

    def refresh(self) -> bool:
        """Loads the latest committed version, and returns True if there was a new one."""
        with self._lock:
            if self._store.version() == self._snapshot.version:
                return False
            self._snapshot = self._store.snapshot()
            return True

    def query(
        self, text: str, k: int = 10, *, exhaustive: bool = False, **filters: Unpack[Filters]
    ) -> Answer:
        """Searches for the segments that match a sentence best.

        Args:
            text: the sentence.
            k: number of results; all segments if there are fewer.
            exhaustive: True to score every segment by the full model.
            **filters: `path`: only files whose path contains this, or matches it as a pattern with
                * and ?; `start`, `end`: only segments that overlap this interval of their file,
                seconds.

        Raises:
            InputError: the sentence is empty, k is below 1, or the model has no tokenizer.
        """
        if exhaustive:
            return self.query_exhaustively([text], k, **filters)[0]
        stopwatch = Stopwatch()
        features = self._encode([text])
        stopwatch.lap("encoding")
        answer = self._search(self._funnel, features, k, filters)
        return self._complete(answer, stopwatch, self._note(text))

    def query_exhaustively(
        self,
        texts: Sequence[str],
        k: int = 10,
        *,
        bar: tqdm | None = None,
        **filters: Unpack[Filters],
    ) -> list[Answer]:
        """Scores every segment by the full model for each of T sentences.

        Options as in `query`. `bar` is a progress bar over segments.
        """
        stopwatch = Stopwatch()
        features = self._encode(texts)
        stopwatch.lap("encoding")
        snapshot, allowed = self._select(k, filters)
        answers = self._funnel.search_exhaustively(snapshot, features, k, allowed=allowed, bar=bar)
        return [
            self._complete(answer, stopwatch, self._note(text))
            for text, answer in zip(texts, answers, strict=True)
        ]

    def similar(self, file: AnyPath, k: int = 10, **filters: Unpack[Filters]) -> Answer:
        """Searches for segments similar to a video or image file, with the options of `query`.

        The score is a logit: the mean of video-video and video-frame similarity.

        Raises:
            InputError: the file cannot be read, or its suffix is not that of a video or an image.
        """
        # FFmpeg would follow a playlist to other files and thereby disclose them.
        suffix = Path(file).suffix.lower()
        if suffix not in (*VIDEO_SUFFIXES, *_IMAGE_SUFFIXES):
            raise InputError(f"{file}: suffix must be that of a video or an image")
        stopwatch = Stopwatch()
        example = _read_image(file) if suffix in _IMAGE_SUFFIXES else file
        vector_D = np.asarray(self.retriever.encode_video([example]).video[0])
        stopwatch.lap("encoding")
        answer = self._search_example(vector_D, k, filters)
        return self._complete(answer, stopwatch)

    def like(self, segment_id: str, k: int = 10) -> Answer:
        """Searches for segments similar to an indexed one, or raises KeyError for an unknown id."""
        snapshot, _ = self._select(k, {})
        video = snapshot.features(np.array([snapshot.row(segment_id)]))
        vector_D = np.asarray(video.video[0])
        answer = self._search_example(vector_D, k + 1, {})
        others = [hit for hit in answer if hit.id != segment_id][:k]
        hits = [dataclasses.replace(hit, rank=rank) for rank, hit in enumerate(others, 1)]
        return dataclasses.replace(answer, hits=hits)

    def rank_captions(self, video: AnyPath, captions: Sequence[str]) -> list[tuple[str, float]]:
        """Returns (caption, logit) of T sentences for one video file, best first."""
        text = self.retriever.encode_text(captions)
        scores_T = self.retriever.similarity(text, self.retriever.encode_video([video]))[:, 0]
        order = np.argsort(-scores_T, kind="stable")
        return [(captions[index], float(scores_T[index])) for index in map(int, order)]

    def attention(self, segment_id: str, text: str) -> Attention:
        """Computes AOSM's attention over a sentence and a segment.

        Raises InputError if the model has no word-frame similarity, KeyError for an unknown id.
        """
        model, params = self.retriever.model, self.retriever.params
        config = model.config
        if not config.has_granularities or "frame_word" not in config.granularities:
            raise InputError("no heat map: this model does not compare words with frames")
        snapshot = self._snapshot
        row = snapshot.row(segment_id)
        sentence = self.retriever.encode_text([text])
        video = snapshot.features(np.array([row]))
        method = "word_frame_attention"
        weights_WxF = apply_model(params, sentence, video, model=model, method=method)[0]
        words, mask_W = list_words(model, self.retriever.get_tokenizer(), text, sentence.mask[0])
        mask_F = video.mask[0]
        weights = np.asarray(weights_WxF)[mask_W][:, mask_F]
        return Attention(words, snapshot.times[row, mask_F].tolist(), weights)

    def tables(self) -> Iterator[pa.Table]:
        """Yields all stored columns except the thumbnails as Arrow tables."""
        return self._snapshot.tables()

    def segment(self, segment_id: str) -> Hit:
        """Returns a segment as a Hit of rank 0, or raises KeyError for an unknown id."""
        snapshot = self._snapshot
        return make_hit(snapshot, snapshot.row(segment_id))

    def thumbnail(self, segment_id: str) -> bytes:
        """Returns a segment's JPEG thumbnail, or raises KeyError for an unknown id."""
        snapshot = self._snapshot
        rows = np.array([snapshot.row(segment_id)])
        return snapshot.read(rows, ["thumbnail"])["thumbnail"][0].as_py()

    def warm_up(self) -> None:
        """Compiles everything that queries use, so that the first one is fast."""
        for hit in self.query("a", k=1):
            self.like(hit.id, k=1)
            with contextlib.suppress(InputError):
                self.attention(hit.id, "a")

    @functools.cached_property
    def _funnel(self) -> Funnel:
        retriever = self.retriever
        return Funnel(retriever.model, retriever.params, self.candidates, self.rerank)

    def _encode(self, texts: Sequence[str]) -> TextFeatures:
        if not all(isinstance(text, str) for text in texts):
            raise InputError("a sentence must be a str")
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # lone surrogates
        if not all(text.split() for text in texts):
            raise InputError("the sentence is empty")
        return self.retriever.encode_text(texts)

    def _note(self, text: str) -> str | None:
        tokenizer = self.retriever.tokenizer
        if tokenizer is None or not tokenizer.is_truncated(text):
            return None
        return f"only the first {tokenizer.max_words - 2} tokens of the sentence were used"

    def _search_example(
        self, vector_D: Float[np.ndarray, " D"], k: int, filters: Filters
    ) -> Answer:
        text = make_example_query(vector_D, self.retriever.model.config.max_words)
        return self._search(make_example_funnel(self._funnel), text, k, filters)

    def _search(self, funnel: Funnel, text: TextFeatures, k: int, filters: Filters) -> Answer:
        snapshot, allowed = self._select(k, filters)
        try:
            return funnel.search(snapshot, text, k, allowed)
        except InputError:  # a writer compacted the index, and this version's files are deleted
            if not self.refresh():
                raise
            return self._search(funnel, text, k, filters)

    def _select(self, k: int, filters: Filters) -> tuple[Snapshot, RowMask | None]:
        """Returns (snapshot to search, mask of the rows to search or None for all)."""
        if not isinstance(k, int) or k < 1:
            raise InputError(f"k = {k!r}: must be an integer of at least 1")
        snapshot = self._snapshot
        return snapshot, snapshot.matching_rows(**filters)

    @staticmethod
    def _complete(answer: Answer, stopwatch: Stopwatch, note: str | None = None) -> Answer:
        seconds = stopwatch.seconds | answer.seconds
        return dataclasses.replace(answer, seconds=seconds, note=note)


def _read_image(file: AnyPath) -> UInt8[np.ndarray, "1 H W 3"]:
    """Reads an image file as a video of one frame."""
    try:
        with Image.open(file) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
    except Exception as error:  # Pillow's plugins raise many types
        raise InputError(f"{file}: cannot be read as an image: {error}") from None


def _to_list(paths: AnyPath | Iterable[AnyPath]) -> list[AnyPath]:
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def _absolute_model_folder(model: AnyPath) -> str:
    return os.path.abspath(model_folder(model))
