"""Searches an index by sentence, video or image, wherever its segments are held."""

import abc
import dataclasses
import functools
import operator
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar, Unpack

import numpy as np

from xclip_jax.checkpoint import model_folder
from xclip_jax.cli import InputError, PathLike
from xclip_jax.inference import copy_to_local_devices
from xclip_jax.retriever import Retriever, load
from xclip_jax.search.answers import Request, make_answer
from xclip_jax.search.digests import check_unchanged
from xclip_jax.search.examples import read_example
from xclip_jax.search.funnel import Funnel
from xclip_jax.search.indexing import fingerprint
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
from xclip_jax.search.selection import Selection
from xclip_jax.search.shard import Scorer, compare_frames
from xclip_jax.search.shards import Shards
from xclip_jax.search.store import Store
from xclip_jax.similarity import AnyArray, VideoFeatures

T = TypeVar("T")


class Searcher(abc.ABC):
    """An index to search, and the model that made it.

    Searching is thread-safe, even while another process adds files: see `refresh`.

    Attributes:
        location, about: see xclip_jax.search.store.Store.
        model_name: absolute path of the model directory.
        candidates, rerank: widths of the funnel, see xclip_jax.search.funnel.
        concurrency: number of queries that are worth running at the same time.
    """

    concurrency = 2

    def __init__(
        self,
        store: Store,
        *,
        model: PathLike | None = None,
        candidates: int = 5000,
        rerank: int = 200,
    ) -> None:
        """Opens an index, see `xclip_jax.search.Index.open`."""
        if candidates < 1 or rerank < 1:
            raise InputError(f"candidates = {candidates}, rerank = {rerank}: must be at least 1")
        self.location, self.about = store.location, store.about
        self.model_name: str = self.about["model"]
        self.candidates, self.rerank = candidates, rerank
        self._store = store
        self._passages, self._calibration = Passages(store.location), store.calibration()
        if model is not None:
            self.model_name = os.path.abspath(model_folder(model))
            self.retriever  # noqa: B018  (a wrong model must fail here, not at the first query)

    @property
    @abc.abstractmethod
    def num_segments(self) -> int:
        """Number of segments in the version that is searched."""

    @property
    @abc.abstractmethod
    def num_files(self) -> int:
        """Number of files in the version that is searched."""

    @abc.abstractmethod
    def refresh(self) -> bool:
        """Loads the latest committed version, and returns True if there was a new one."""

    @abc.abstractmethod
    def _ask(self, function: Callable[[Shards], T]) -> T:
        """Calls a function of the version that is searched."""

    def __len__(self) -> int:
        return self.num_segments

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
        request = dataclasses.replace(request, interval=selection.interval)

        def search(shards: Shards) -> list[Answer]:
            rankings = self._funnel.rank_exhaustively(shards, selection, features, request.depth)
            return [make_answer(r.segments, r, [], request) for r in rankings]

        answers = zip(texts, self._ask(search), strict=True)
        return [self._complete(answer, encoding, text) for text, answer in answers]

    def similar(self, file: PathLike, k: int = 10, **options: Unpack[Options]) -> Answer:
        """Searches for moments similar to a video or image file, with the options of `query`.

        The score is a logit: the mean of video-video and video-frame similarity. Raises InputError
        if the file cannot be read, or its suffix is not that of a video or an image.
        """
        started, config = time.perf_counter(), self.retriever.model.config
        vector_1xD = self.retriever.encode_video([read_example(file, config)]).video
        return self._search(self._make_example(vector_1xD), k, options, started)

    def like(self, segment_id: str, k: int = 10, **options: Unpack[Options]) -> Answer:
        """Searches for moments similar to an indexed segment, with the options of `query`.

        Raises KeyError for an unknown id.
        """

        def make_query(shards: Shards) -> Query:
            vector_1xD = shards.features(shards.find(segment_id)).video
            return dataclasses.replace(self._make_example(vector_1xD), without=segment_id)

        return self._search(make_query, k, options, time.perf_counter())

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

        def read(shards: Shards) -> tuple[VideoFeatures, np.ndarray]:
            row = shards.find(segment_id)
            return shards.features(row), shards.segments(row).times_nxF[0]

        words, (video, times_F) = WordQuery.parse(text), self._ask(read)
        features, mask_F = self.retriever.encode_text([words.sentence]), np.asarray(video.mask)[0]
        sentence_F = smooth(compare_frames(features, video), np.asarray(video.mask))[0, mask_F]
        names, words_WxF = self.retriever.compare_words(words.sentence, features, video)
        return HeatMap(names, times_F[mask_F].tolist(), words_WxF, sentence_F.tolist())

    def segment(self, segment_id: str) -> Hit:
        """Returns a segment as a Hit of score None, or raises KeyError for an unknown id."""
        segments = self._ask(lambda shards: shards.segments(shards.find(segment_id)))
        start, end = float(segments.starts[0]), float(segments.ends[0])
        return segments.hit(int(segments.rows[0]), Moment(start, end, start), score=None)

    def films(self, newest: int = 12) -> list[Film]:
        """Returns the files with the latest modification times, newest first."""

        def read(shards: Shards) -> list[Film]:
            order = [("mtime_max", "descending"), ("path", "ascending")]
            films = shards.films().sort_by(order).slice(0, newest)
            ids = shards.segments(films["row_id_min"].to_numpy()).ids
            names = ("path", "end_max", "mtime_max")
            columns = zip(ids, *(films[name].to_pylist() for name in names), strict=True)
            return [Film(one, path, end, mtime / 1e9) for one, path, end, mtime in columns]

        return self._ask(read)

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
        row = self._ask(lambda shards: shards.stamp(shards.find(segment_id)))
        check_unchanged(row)
        return row["path"]

    def thumbnail(self, segment_id: str) -> bytes:
        """Returns a segment's JPEG thumbnail, or raises KeyError for an unknown id."""
        return self._ask(lambda shards: shards.thumbnail(shards.find(segment_id)))

    def warm_up(self) -> None:
        """Compiles everything that queries use, so that the first one is fast."""
        for hit in self.query("a", k=1, sources=["picture"]):
            self.like(hit.id, k=1)
            self.heat_map(hit.id, "a")

    @functools.cached_property
    def _funnel(self) -> Funnel:
        scorer = Scorer(self.retriever.model, self.retriever.params)
        return Funnel(scorer, self.candidates, self.rerank)

    def _make_example(self, vector_1xD: AnyArray) -> Query:
        return Query(self._funnel.of_examples(), self._funnel.scorer.make_example(vector_1xD))

    def _search(
        self, query: Query | Callable[[Shards], Query], k: int, options: Options, started: float
    ) -> Answer:
        encoding = time.perf_counter() - started
        sentence = query.words.sentence if isinstance(query, Query) else ""
        selection, request = self._select(k, options, with_sentence=sentence != "")

        def search(shards: Shards) -> Answer:
            made = query if isinstance(query, Query) else query(shards)
            return run_query(made, shards, selection, request, self._passages)

        has_model = isinstance(query, Query) and query.funnel is not None
        return self._complete(self._ask(search), encoding, sentence if has_model else "")

    def _select(
        self, k: int, options: Options, *, with_sentence: bool
    ) -> tuple[Selection, Request]:
        """Returns the rows to search, and which hits to make of them."""
        selection, request = split_options(k, options)
        if with_sentence:  # the calibration does not describe examples
            limits = self._calibration.threshold, self._calibration.background
            request = dataclasses.replace(request, threshold=limits[0], background=limits[1])
        return selection, request

    def _complete(self, answer: Answer, encoding: float, text: str) -> Answer:
        """Adds the seconds of encoding, and what the user should know.

        `text` is the sentence, which may have been truncated, or "".
        """
        tokenizer, notes = self.retriever.tokenizer if text else None, []
        if tokenizer is not None and tokenizer.is_truncated(text):
            notes.append(f"only the first {tokenizer.num_words} tokens of the sentence were used")
        if answer.missing:
            shards = "a shard" if answer.missing == 1 else f"{answer.missing} shards"
            notes.append(f"incomplete: {shards} of the index did not answer")
        seconds = {"encoding": encoding, **answer.seconds}
        return dataclasses.replace(answer, seconds=seconds, note="; ".join(notes) or None)
