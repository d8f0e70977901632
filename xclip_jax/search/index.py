"""Indexes a video collection, and searches it by sentence, video or image."""

import contextlib
import dataclasses
import functools
import operator
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from xclip_jax.checkpoint import model_folder
from xclip_jax.cli import InputError, PathLike, explain_no_file
from xclip_jax.data.container import VideoError
from xclip_jax.data.extraction import VIDEO_SUFFIXES
from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.preprocess import frame_format, read_image
from xclip_jax.data.tokenizer import is_blank
from xclip_jax.data.video import Limits, read_frames
from xclip_jax.inference import copy_to_local_devices
from xclip_jax.models import ModelConfig
from xclip_jax.retriever import Retriever, load
from xclip_jax.search.bank import check_bank
from xclip_jax.search.digests import sample_file
from xclip_jax.search.funnel import Answer, Attention, Funnel, Hit, make_hits
from xclip_jax.search.indexing import IndexingSummary, add_files, fingerprint, is_below
from xclip_jax.search.snapshot import MAX_PATH, Filters, Selection
from xclip_jax.search.store import Store
from xclip_jax.similarity import TextFeatures

SEGMENT_SECONDS = 30
PRECISIONS = ("float32", "float16")
MAX_SENTENCE = 10_000  # characters
EXAMPLE_SECONDS = 600.0  # of a video that is an example
EXAMPLE_LIMITS = Limits(pixels=2**24, working_seconds=4)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
Query = tuple[Funnel, TextFeatures]


class Index:
    """Segments of videos with their features, and the model that computed them.

    Searching is thread-safe, even while another process adds files: see `refresh`.

    Attributes:
        location, about: see xclip_jax.search.store.Store.
        model_name: absolute path of the model directory.
        candidates, rerank: widths of the funnel, see xclip_jax.search.funnel.
    """

    def __init__(self, store: Store) -> None:
        self.location, self.about = store.location, store.about
        self.model_name = self.about["model"]
        self.candidates, self.rerank = 5000, 200
        self._store, self._snapshot = store, store.snapshot()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        location: PathLike,
        model: PathLike | None = None,
        candidates: int = 5000,
        rerank: int = 200,
    ) -> "Index":
        """Opens an index, or raises InputError if it is missing, corrupted or of another model.

        Args:
            location: a folder, or the URI of a bucket (s3://, gs://, az://).
            model: a model or work directory; None: the path stored in the index.
            candidates: number of segments scored by the word granularities.
            rerank: number of segments scored by the full model, which reads their frames.
        """
        if candidates < 1 or rerank < 1:
            raise InputError(f"candidates = {candidates}, rerank = {rerank}: must be at least 1")
        index = cls(Store(location))
        index.candidates, index.rerank = candidates, rerank
        if model is not None:
            index.model_name = os.path.abspath(model_folder(model))
            index.retriever  # noqa: B018  (a wrong model must fail here, not at the first query)
        return index

    @classmethod
    def create(
        cls,
        location: PathLike,
        model: PathLike,
        *,
        segment_seconds: int = SEGMENT_SECONDS,
        shots: bool = False,
        precision: Literal["float32", "float16"] = "float32",
        bank: Iterable[str] | None = None,
    ) -> "Index":
        """Creates an empty index, or raises InputError if there is one already or no model.

        Args:
            location, model: see `open`.
            segment_seconds: length of a segment in whole seconds, at least 1.
            shots: True to cut at shot changes, with `segment_seconds` as the maximum length.
            precision: of the stored features; "float16" halves the disk space and changes logits
                by about 0.01.
            bank: 100 to 5,000 captions that resemble the queries, such as training captions, from
                which a hubness bias of each segment is computed, see `metrics.hubness_bias`.
        """
        if not isinstance(segment_seconds, int) or segment_seconds < 1:
            raise InputError(f"segment_seconds = {segment_seconds}: must be an integer >= 1")
        if precision not in PRECISIONS:
            raise InputError(f"precision = {precision!r}: must be {' or '.join(PRECISIONS)}")
        retriever, path = load(model), os.path.abspath(model_folder(model))
        retriever.require("vision", "search index")
        config = retriever.model.config
        about = {"model": path, "fingerprint": fingerprint(retriever)}
        about |= {"max_frames": config.max_frames, "embed_dim": config.embed_dim}
        about |= {"frame_weights": True} if config.aggregation == "weighted" else {}
        about |= {"segment_seconds": segment_seconds, "shots": shots, "precision": precision}
        captions = [] if bank is None else check_bank(bank)
        if captions:
            retriever.get_tokenizer()
        return cls(Store.create(location, about, captions))

    def __len__(self) -> int:
        return self.num_segments

    @property
    def num_segments(self) -> int:
        """Number of segments in the version that is searched."""
        return len(self._snapshot)

    @property
    def num_files(self) -> int:
        """Number of files in the version that is searched."""
        return len(self._snapshot.paths.unique())

    @functools.cached_property
    def retriever(self) -> Retriever:
        """The model, loaded on first use.

        Raises InputError if it is missing, or is not the one that the index was made with.
        """
        original, expected = self.about["model"], self.about["fingerprint"]
        if self.model_name == original and not Path(original).is_dir():
            problem = f"the model of {self.location} is no longer in {original}"
            raise InputError(f"{problem}: set --model to its new location")
        retriever = load(self.model_name)
        actual = fingerprint(retriever)
        if actual != expected:
            models = f"the model {original} ({expected}), not with {self.model_name} ({actual})"
            problem = f"{self.location} was made with {models}"
            raise InputError(f"{problem}: vectors of different models cannot be compared")
        retriever.params = copy_to_local_devices(retriever.params)
        return retriever

    def add(self, videos: PathLike | Iterable[PathLike], prune: bool = False) -> IndexingSummary:
        """Adds video files and the video files in folders and their subfolders.

        Unchanged files (same size and modification time) are skipped, changed ones are read again.
        After an interruption, a second call resumes. `prune` removes files that no longer exist
        in these folders. Raises InputError if there is no video.
        """
        corrupted = self._snapshot.corrupted
        self._store.remove(dict.fromkeys(sorted(corrupted)))  # to be read again
        summary = add_files(self._store, self.retriever, _to_list(videos), prune=prune)
        self.refresh()
        return summary

    def remove(self, videos: PathLike | Iterable[PathLike]) -> int:
        """Removes files and all files below folders, and returns the number of removed segments."""
        self.refresh()
        num_before, videos = self.num_segments, _to_list(videos)
        paths = self._store.files()
        self._store.remove({path: None for path in paths if is_below(path, videos)})
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
            text: the sentence, not empty.
            k: number of results, at least 1; all segments if there are fewer.
            exhaustive: True to score every segment by the full model.
            **filters: see `Filters`.

        Raises:
            InputError: an argument is invalid, or the model has no tokenizer.
        """
        if exhaustive:
            return self.query_exhaustively([text], k, **filters)[0]
        started = time.perf_counter()
        return self._search((self._funnel, self._encode([text])), k, filters, started, text)

    def query_exhaustively(
        self, texts: Sequence[str], k: int = 10, **filters: Unpack[Filters]
    ) -> list[Answer]:
        """Scores every segment by the full model for each of T sentences, see `query`."""
        started = time.perf_counter()
        features = self._encode(texts)
        encoding = time.perf_counter() - started
        answers = self._funnel.search_exhaustively(self._select(k, filters), features, k)
        return [self._complete(a, encoding, text) for text, a in zip(texts, answers, strict=True)]

    def similar(self, file: PathLike, k: int = 10, **filters: Unpack[Filters]) -> Answer:
        """Searches for segments similar to a video or image file, with the options of `query`.

        The score is a logit: the mean of video-video and video-frame similarity. Raises InputError
        if the file cannot be read, or its suffix is not that of a video or an image.
        """
        started, video, suffix = time.perf_counter(), file, Path(file).suffix.lower()
        if suffix in _IMAGE_SUFFIXES:
            try:
                video = read_image(file)[None]
            except Exception as error:  # Pillow's plugins raise many types
                raise InputError(f"{file}: cannot be read as an image: {error}") from None
        elif suffix not in VIDEO_SUFFIXES:  # FFmpeg would disclose the files that a playlist names
            raise InputError(f"{file}: suffix must be that of a video or an image")
        else:
            video = _read_example(file, self.retriever.model.config)
        query = self._funnel.example(self.retriever.encode_video([video]).video)
        return self._search(query, k, filters, started, "")

    def like(self, segment_id: str, k: int = 10, **filters: Unpack[Filters]) -> Answer:
        """Searches for segments similar to an indexed one, with the options of `query`.

        Raises KeyError for an unknown id.
        """
        started, snapshot = time.perf_counter(), self._select(k, filters).snapshot
        query = self._funnel.example(snapshot.features(snapshot.find(segment_id)).video)
        answer = self._search(query, k + 1, filters, started, "")
        others = [hit for hit in answer if hit.id != segment_id][:k]
        hits = [dataclasses.replace(hit, rank=rank) for rank, hit in enumerate(others, 1)]
        return dataclasses.replace(answer, hits=hits)

    def rank_captions(self, video: PathLike, captions: Sequence[str]) -> list[tuple[str, float]]:
        """Returns (caption, logit) of T sentences for one video file, best first."""
        text = self.retriever.encode_text(captions)
        scores_T = self.retriever.similarity(text, self.retriever.encode_video([video]))[:, 0]
        pairs = zip(captions, scores_T.tolist(), strict=True)
        return sorted(pairs, key=operator.itemgetter(1), reverse=True)

    def attention(self, segment_id: str, text: str) -> Attention:
        """Computes AOSM's attention over a sentence and a segment.

        Raises InputError if the model has no word-frame similarity, KeyError for an unknown id.
        """
        retriever, snapshot = self.retriever, self._snapshot
        config = retriever.model.config
        if not config.has_granularities or "frame_word" not in config.granularities:
            raise InputError("no heat map: this model does not compare words with frames")
        row = snapshot.find(segment_id)
        video = snapshot.features(row)
        words, weights = retriever.attention(text, retriever.encode_text([text]), video)
        return Attention(words, snapshot.times[row][video.mask].tolist(), weights)

    def tables(self) -> Iterator[pa.Table]:
        """Yields all stored columns except thumbnails and checksums as Arrow tables."""
        return self._snapshot.tables()

    def segment(self, segment_id: str) -> Hit:
        """Returns a segment as a Hit of score 0, or raises KeyError for an unknown id."""
        snapshot = self._snapshot
        row = snapshot.find(segment_id)
        return make_hits(snapshot, row, np.zeros(1), np.array([0]), biases=np.zeros(1))[0]

    def find_file(self, segment_id: str) -> str:
        """Returns the path of a segment's file.

        Raises KeyError for an unknown id, OSError if the file cannot be read, or is no longer the
        one that was indexed.
        """
        snapshot = self._snapshot
        row = snapshot.stamp(snapshot.find(segment_id))
        path, name = row["path"], os.path.basename(row["path"])
        if problem := explain_no_file(path):
            raise OSError(f"{name} {problem}")
        try:
            status, sample = os.stat(path), sample_file(path)
        except FileNotFoundError:
            raise OSError(f"{name} is no longer on disk") from None
        except OSError as error:
            raise OSError(f"{name} cannot be read: {error.strerror}") from None
        found = status.st_size, status.st_mtime_ns, sample
        if found != (row["size"], row["mtime"], row.get("sample", sample)):
            raise OSError(f"{name} has changed since it was indexed: index it again")
        return path

    def thumbnail(self, segment_id: str) -> bytes:
        """Returns a segment's JPEG thumbnail, or raises KeyError for an unknown id."""
        snapshot = self._snapshot
        return snapshot.thumbnail(snapshot.find(segment_id))

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
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # lone surrogates
        if any(len(text) > MAX_SENTENCE for text in texts):
            raise InputError(f"the sentence has more than {MAX_SENTENCE:,} characters")
        if any(map(is_blank, texts)):
            raise InputError("the sentence is empty")
        return self.retriever.encode_text(texts)

    def _search(self, query: Query, k: int, filters: Filters, started: float, text: str) -> Answer:
        (funnel, features), encoding = query, time.perf_counter() - started
        while True:
            selection = self._select(k, filters)
            try:
                answer = funnel.search(selection, features, k)
                return self._complete(answer, encoding, text)
            except InputError:  # a writer compacted the index, and this version's files are deleted
                if not self.refresh():
                    raise

    def _select(self, k: int, filters: Filters) -> Selection:
        """Returns the rows to search."""
        if not isinstance(k, int) or k < 1:
            raise InputError(f"k = {k!r}: must be an integer of at least 1")
        _check_filters(filters)
        return self._snapshot.select(**filters)

    def _complete(self, answer: Answer, encoding: float, text: str) -> Answer:
        """Adds the seconds of encoding, and a note if the sentence was truncated."""
        tokenizer, note = self.retriever.tokenizer, None
        if tokenizer is not None and tokenizer.is_truncated(text):
            note = f"only the first {tokenizer.num_words} tokens of the sentence were used"
        seconds = {"encoding": encoding, **answer.seconds}
        return dataclasses.replace(answer, seconds=seconds, note=note)


def _check_filters(filters: Filters) -> None:
    """Raises InputError if filters have invalid types or values, or start > end."""
    path, start, end = filters.get("path"), filters.get("start"), filters.get("end")
    if not isinstance(path, str | None) or len(path or "") > MAX_PATH:
        raise InputError(f"path: must be a string of at most {MAX_PATH} characters")
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (isinstance(value, int | float) and 0 <= value < np.inf):
            raise InputError(f"{name} = {value!r:.99}: must be a number of seconds, at least 0")
    if start is not None and end is not None and start > end:
        raise InputError(f"start = {start:g}, end = {end:g}: start must not be after end")


def _read_example(file: PathLike, config: ModelConfig) -> UInt8[np.ndarray, "F S S 3"]:
    """Returns frames of the start of a video file, within EXAMPLE_LIMITS."""
    options: Any = {"end": EXAMPLE_SECONDS, "limits": EXAMPLE_LIMITS}
    try:
        frames = read_frames(file, frame_format(config), **options).frames
        return np.stack([frames[index] for index in choose_frames(len(frames), config.max_frames)])
    except VideoError as error:
        raise InputError(f"{file}: {error}") from None


def _to_list(paths: PathLike | Iterable[PathLike]) -> list[PathLike]:
    return [paths] if isinstance(paths, PathLike) else list(paths)
