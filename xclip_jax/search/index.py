"""Indexes a video collection, and searches it by sentence, video or image."""

import dataclasses
import functools
import operator
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import pyarrow as pa

from xclip_jax.checkpoint import model_folder
from xclip_jax.cli import InputError, PathLike
from xclip_jax.inference import copy_to_local_devices
from xclip_jax.retriever import Retriever, load
from xclip_jax.search.answers import Request, make_answer
from xclip_jax.search.bank import check_bank
from xclip_jax.search.calibration import measure
from xclip_jax.search.digests import check_unchanged
from xclip_jax.search.examples import read_example
from xclip_jax.search.funnel import Funnel, compare_frames
from xclip_jax.search.indexing import IndexingSummary, add_files, fingerprint, is_below
from xclip_jax.search.moments import Moment, smooth
from xclip_jax.search.passages import Passages
from xclip_jax.search.querying import (
    Options,
    Query,
    WordQuery,
    choose_sources,
    run_query,
    split_options,
)
from xclip_jax.search.results import SOURCES, Answer, Film, HeatMap, Hit, Source
from xclip_jax.search.snapshot import Selection
from xclip_jax.search.store import Store
from xclip_jax.search.timed_text import make_readers

SEGMENT_SECONDS = 10
PRECISIONS = ("float32", "float16")


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
        self._passages, self._calibration = Passages(store.location), store.calibration()
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

    def add(
        self,
        videos: PathLike | Iterable[PathLike],
        prune: bool = False,
        *,
        ocr: bool = False,
        speech: str | None = None,
    ) -> IndexingSummary:
        """Adds video files and the video files in folders and their subfolders.

        Unchanged files (same size and modification time) are skipped, changed ones are read again.
        After an interruption, a second call resumes. Subtitles are read too.

        Args:
            videos: files and folders.
            prune: True to remove files that no longer exist in these folders.
            ocr: True to read the text on screen, of indexed files too.
            speech: model of faster-whisper (a folder or a name) that transcribes the sound, of
                indexed files too; None: sound is not read.

        Raises:
            InputError: there is no video, or what `ocr` or `speech` needs is not installed.
        """
        readers = make_readers(ocr=ocr, speech=speech)
        corrupted = self._snapshot.corrupted
        self._store.remove(dict.fromkeys(sorted(corrupted)))  # to be read again
        summary = add_files(self._store, self.retriever, _to_list(videos), readers, prune=prune)
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
                self._snapshot = self._store.snapshot()
            if self._calibration.version != self._snapshot.version:  # saved after the segments
                self._calibration = self._store.calibration()
            return has_new_segments or has_new_text

    def query(
        self,
        text: str,
        k: int = 10,
        *,
        sources: Collection[Source] | None = None,
        exhaustive: bool = False,
        **options: Unpack[Options],
    ) -> Answer:
        """Searches for the moments that match a sentence best.

        Words in quotation marks must be said or written in the segment.

        Args:
            text: the sentence, not empty.
            k: number of results, at least 1; all if there are fewer.
            sources: what to search; None: all that the index has. Several are fused by rank. With
                pictures, a segment matches by its text only if it has every word of the sentence
                except stop words. Without pictures, one word is enough.
            exhaustive: True to score every segment by the full model.
            **options: see `Options`.

        Raises:
            InputError: an argument is invalid, or the model has no tokenizer.
        """
        started, words = time.perf_counter(), WordQuery.parse(text)
        chosen = choose_sources(sources, self.sources)
        features = self.retriever.encode_text([words.sentence]) if "picture" in chosen else None
        query = Query(self._funnel if features else None, features, words, chosen, exhaustive)
        return self._search(query, k, options, started)

    def query_exhaustively(
        self, texts: Sequence[str], k: int = 10, **options: Unpack[Options]
    ) -> list[Answer]:
        """Scores every segment by the full model for each of T sentences, see `query`.

        What is said and written is not searched, and quoted words are left out.
        """
        started = time.perf_counter()
        texts = [WordQuery.parse(text).sentence for text in texts]
        features = self.retriever.encode_text(texts)
        encoding = time.perf_counter() - started
        selection, request = self._select(k, options, with_sentence=True)
        if not len(selection):
            return [Answer([], {}, 0) for _ in texts]
        rankings = self._funnel.rank_exhaustively(selection, features, request.depth)
        answers = (make_answer(selection, ranking, [], request) for ranking in rankings)
        return [self._complete(a, encoding, text) for text, a in zip(texts, answers, strict=True)]

    def similar(self, file: PathLike, k: int = 10, **options: Unpack[Options]) -> Answer:
        """Searches for moments similar to a video or image file, with the options of `query`.

        The score is a logit: the mean of video-video and video-frame similarity. Raises InputError
        if the file cannot be read, or its suffix is not that of a video or an image.
        """
        started, config = time.perf_counter(), self.retriever.model.config
        vector_1xD = self.retriever.encode_video([read_example(file, config)]).video
        return self._search(Query(*self._funnel.example(vector_1xD)), k, options, started)

    def like(self, segment_id: str, k: int = 10, **options: Unpack[Options]) -> Answer:
        """Searches for moments similar to an indexed segment, with the options of `query`.

        Raises KeyError for an unknown id.
        """
        started, snapshot = time.perf_counter(), self._snapshot
        row = snapshot.find(segment_id)
        query = Query(*self._funnel.example(snapshot.features(row).video), without=segment_id)
        return self._search(query, k, options, started)

    def rank_captions(self, video: PathLike, captions: Sequence[str]) -> list[tuple[str, float]]:
        """Returns (caption, logit) of T sentences for one video file, best first."""
        text = self.retriever.encode_text(captions)
        scores_T = self.retriever.similarity(text, self.retriever.encode_video([video]))[:, 0]
        pairs = zip(captions, scores_T.tolist(), strict=True)
        return sorted(pairs, key=operator.itemgetter(1), reverse=True)

    def heat_map(self, segment_id: str, text: str) -> HeatMap:
        """Computes the similarities of a sentence and its words with the frames of a segment.

        Raises InputError if the text is empty, KeyError for an unknown id.
        """
        snapshot, words = self._snapshot, WordQuery.parse(text)
        row = snapshot.find(segment_id)
        features, video = self.retriever.encode_text([words.sentence]), snapshot.features(row)
        mask_F = np.asarray(video.mask)[0]
        sentence_F = smooth(compare_frames(features, video), np.asarray(video.mask))[0, mask_F]
        names, words_WxF = self.retriever.compare_words(words.sentence, features, video)
        times = snapshot.times[row[0]][mask_F].tolist()
        return HeatMap(names, times, words_WxF, sentence_F.tolist())

    def tables(self) -> Iterator[pa.Table]:
        """Yields all stored columns except thumbnails and checksums as Arrow tables."""
        return self._snapshot.tables()

    def segment(self, segment_id: str) -> Hit:
        """Returns a segment as a Hit of score None, or raises KeyError for an unknown id."""
        snapshot = self._snapshot
        row = int(snapshot.find(segment_id)[0])
        start, end = float(snapshot.starts[row]), float(snapshot.ends[row])
        return snapshot.hit(row, Moment(start, end, start), score=None)

    def films(self, newest: int = 12) -> list[Film]:
        """Returns the files with the latest modification times, newest first."""
        films = self._snapshot.films.sort_by([("mtime_max", "descending")]).slice(0, newest)
        return [
            Film(film["id_first"], film["path"], film["end_max"], film["mtime_max"] / 1e9)
            for film in films.to_pylist()
        ]

    @property
    def sources(self) -> tuple[Source, ...]:
        """Sources to search: pictures, and what is said and written if it was read."""
        known = {"picture", *self._passages.sources}
        return tuple(source for source in SOURCES if source in known)

    @property
    def examples(self) -> list[str]:
        """Sentences to try, [] if the model has no tokenizer."""
        return list(self._calibration.examples)

    def find_file(self, segment_id: str) -> str:
        """Returns the path of a segment's file.

        Raises KeyError for an unknown id, OSError if the file cannot be read, or is no longer the
        one that was indexed.
        """
        snapshot = self._snapshot
        row = snapshot.stamp(snapshot.find(segment_id))
        check_unchanged(row)
        return row["path"]

    def thumbnail(self, segment_id: str) -> bytes:
        """Returns a segment's JPEG thumbnail, or raises KeyError for an unknown id."""
        snapshot = self._snapshot
        return snapshot.thumbnail(snapshot.find(segment_id))

    def warm_up(self) -> None:
        """Compiles everything that queries use, so that the first one is fast."""
        for hit in self.query("a", k=1, sources=["picture"]):
            self.like(hit.id, k=1)
            self.heat_map(hit.id, "a")

    @functools.cached_property
    def _funnel(self) -> Funnel:
        retriever = self.retriever
        return Funnel(retriever.model, retriever.params, self.candidates, self.rerank)

    def _search(self, query: Query, k: int, options: Options, started: float) -> Answer:
        encoding = time.perf_counter() - started
        while True:
            with_sentence = query.words.sentence != ""
            selection, request = self._select(k, options, with_sentence=with_sentence)
            try:
                answer = run_query(query, selection, request, self._passages)
                sentence = query.words.sentence if query.funnel else ""
                return self._complete(answer, encoding, sentence)
            except InputError:  # a writer compacted the index, and this version's files are deleted
                if not self.refresh():
                    raise

    def _select(
        self, k: int, options: Options, *, with_sentence: bool
    ) -> tuple[Selection, Request]:
        """Returns the rows to search, and which hits to make of them."""
        filters, request = split_options(k, options)
        if with_sentence:  # the calibration does not describe examples
            limits = self._calibration.threshold, self._calibration.background
            request = dataclasses.replace(request, threshold=limits[0], background=limits[1])
        return self._snapshot.select(**filters), request

    def _complete(self, answer: Answer, encoding: float, text: str) -> Answer:
        """Adds the seconds of encoding, and a note if the sentence, "" for none, was truncated."""
        tokenizer, note = self.retriever.tokenizer if text else None, None
        if tokenizer is not None and tokenizer.is_truncated(text):
            note = f"only the first {tokenizer.num_words} tokens of the sentence were used"
        seconds = {"encoding": encoding, **answer.seconds}
        return dataclasses.replace(answer, seconds=seconds, note=note)


def _to_list(paths: PathLike | Iterable[PathLike]) -> list[PathLike]:
    return [paths] if isinstance(paths, PathLike) else list(paths)
