"""Indexes a video collection, and searches it by sentence, video or image."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Unpack

import pyarrow as pa

from xclip_jax.checkpoint import model_folder
from xclip_jax.cli import InputError, PathLike
from xclip_jax.retriever import load
from xclip_jax.search.backends import Distribution
from xclip_jax.search.bank import check_bank
from xclip_jax.search.calibration import measure
from xclip_jax.search.indexing import IndexingSummary, add_files, fingerprint, is_below
from xclip_jax.search.searcher import Searcher, T
from xclip_jax.search.shard import Shard
from xclip_jax.search.shards import LocalParts, Shards
from xclip_jax.search.store import Store
from xclip_jax.search.timed_text import make_readers

SEGMENT_SECONDS = 10
PRECISIONS = ("float32", "float16")


class Index(Searcher):
    """Segments of videos with their features in this process, and the model that computed them."""

    def __init__(self, store: Store, **options: Any) -> None:
        self._snapshot, self._lock = store.snapshot(), threading.Lock()
        self._prefetching: threading.Event | None = None
        super().__init__(store, **options)

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
        return cls(Store(location), model=model, candidates=candidates, rerank=rerank)

    @classmethod
    def create(
        cls,
        location: PathLike,
        model: PathLike,
        *,
        segment_seconds: int = SEGMENT_SECONDS,
        overlap_seconds: int = 0,
        shots: bool = False,
        precision: Literal["float32", "float16"] = "float32",
        bank: Iterable[str] | None = None,
    ) -> "Index":
        """Creates an empty index, or raises InputError if there is one already or no model.

        Args:
            location, model: see `open`.
            segment_seconds: length of a segment in whole seconds, at least 1.
            overlap_seconds: of neighbouring segments in whole seconds, less than their length.
            shots: True to cut at shot changes, with `segment_seconds` as the maximum length.
            precision: of the stored features; "float16" halves the disk space and changes logits
                by about 0.01.
            bank: 100 to 5,000 captions that resemble the queries, such as training captions, from
                which a hubness bias of each segment is computed, see `metrics.hubness_bias`.
        """
        if not isinstance(segment_seconds, int) or segment_seconds < 1:
            raise InputError(f"segment_seconds = {segment_seconds}: must be an integer >= 1")
        if not isinstance(overlap_seconds, int) or not 0 <= overlap_seconds < segment_seconds:
            problem = f"overlap_seconds = {overlap_seconds}: must be an integer"
            raise InputError(f"{problem}, at least 0 and less than {segment_seconds}")
        if precision not in PRECISIONS:
            raise InputError(f"precision = {precision!r}: must be {' or '.join(PRECISIONS)}")
        retriever, path = load(model), os.path.abspath(model_folder(model))
        retriever.require("vision", "search index")
        config = retriever.model.config
        about = {"model": path, "fingerprint": fingerprint(retriever)}
        about |= {"max_frames": config.max_frames, "embed_dim": config.embed_dim}
        about |= {"frame_weights": True} if config.aggregation == "weighted" else {}
        about |= {"overlap_seconds": overlap_seconds} if overlap_seconds else {}
        about |= {"segment_seconds": segment_seconds, "shots": shots, "precision": precision}
        captions = [] if bank is None else check_bank(bank)
        if captions:
            retriever.get_tokenizer()
        return cls(Store.create(location, about, captions))

    @property
    def num_segments(self) -> int:
        """Number of segments in the version that is searched."""
        return len(self._snapshot)

    @property
    def num_files(self) -> int:
        """Number of files in the version that is searched."""
        return len(self._snapshot.films)

    def add(
        self,
        videos: PathLike | Iterable[PathLike],
        prune: bool = False,
        *,
        ocr: bool = False,
        speech: str | None = None,
        **distribution: Unpack[Distribution],
    ) -> IndexingSummary:
        """Adds video files and the video files in folders and their subfolders.

        Unchanged files (same size and modification time) are skipped, changed ones are read again.
        After an interruption, a second call resumes. Subtitles are read too. See `Distribution`.

        Args:
            videos: files and folders.
            prune: True to remove files that no longer exist in these folders.
            ocr: True to read the text on screen, of indexed files too.
            speech: model of faster-whisper (folder or name) that transcribes sound, None for none.

        Raises:
            InputError: there is no video, or what an option needs is not installed.
        """
        extra: Any = {"corrupted": self._snapshot.corrupted, "model": self.model_name}
        extra |= {"readers": make_readers(ocr=ocr, speech=speech), "prune": prune, **distribution}
        summary = add_files(self._store, self.retriever, _to_list(videos), **extra)
        self.refresh()
        is_outdated = self._calibration.version != self._snapshot.version
        if is_outdated and self.retriever.tokenizer and len(self):
            self._calibration = measure(self.retriever, self._snapshot)
            self._store.save_calibration(self._calibration)
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
            has_new_text = self._passages.refresh()
            has_new_segments = self._store.version() != self._snapshot.version
            if has_new_segments:
                self._snapshot = self._store.snapshot(former=self._snapshot)
                if self._prefetching:
                    self._prefetching.set()
                    self._prefetching = self._snapshot.prefetch()
            if self._calibration.version != self._snapshot.version:  # saved after the segments
                self._calibration = self._store.calibration()
            return has_new_segments or has_new_text

    def tables(self) -> Iterator[pa.Table]:
        """Yields all stored columns except thumbnails and checksums as Arrow tables."""
        return self._snapshot.tables()

    def warm_up(self) -> None:
        """Compiles what queries use, and starts to read the frames of an index in a bucket."""
        super().warm_up()
        self._prefetching = self._snapshot.prefetch()

    @property
    def _shards(self) -> Shards:
        """The version that is searched."""
        return Shards(LocalParts(Shard(self._snapshot, self._funnel.scorer)))

    def _ask(self, function: Callable[[Shards], T]) -> T:
        """Calls a function of the version that is searched."""
        while True:
            try:
                return function(self._shards)
            except InputError:  # a writer compacted the index, and this version's files are deleted
                if not self.refresh():
                    raise


def _to_list(paths: PathLike | Iterable[PathLike]) -> list[PathLike]:
    return [paths] if isinstance(paths, PathLike) else list(paths)
