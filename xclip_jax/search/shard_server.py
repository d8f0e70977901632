"""Holds one part of an index in a process of its own, for the front end in another one."""

import threading
import time
from typing import Any

import numpy as np

from xclip_jax.cli import InputError, PathLike
from xclip_jax.retriever import load
from xclip_jax.search.encoding import fingerprint
from xclip_jax.search.row_ids import Part
from xclip_jax.search.shard import Scorer, Shard
from xclip_jax.search.store import Store
from xclip_jax.similarity import TextFeatures

TOWERS = ("visual", "textual")  # of CLIP, which encode; a shard compares what they have encoded
KEPT_SECONDS = 60  # in which queries may still ask for the version before


class ShardServer:
    """A part of an index: the version that is searched, and for some time the one before.

    `model` is the model's directory. Raises InputError if it is not the one that made the index.
    """

    def __init__(self, location: PathLike, model: PathLike, part: Part) -> None:
        self._store, self._part = Store(location), part
        retriever = load(model)
        if (actual := fingerprint(retriever)) != (expected := self._store.about["fingerprint"]):
            problem = f"{location} was made with another model ({expected}) than {model} ({actual})"
            raise InputError(problem)
        clip = {k: v for k, v in retriever.params["clip"].items() if k not in TOWERS}
        self._scorer = Scorer(retriever.model, {**retriever.params, "clip": clip})
        self._shards: dict[int, Shard] = {}
        self._lock, self._prefetching = threading.Lock(), threading.Event()
        self._load_time = 0.0
        self.load(self._store.version())
        self._warm_up()

    def ping(self) -> bool:
        """Returns True, to show that the process lives."""
        return True

    def load(self, version: int) -> tuple[int, int]:
        """Loads a version unless it is held, and returns its numbers of segments and of files."""
        snapshot = self._open(version).snapshot
        return len(snapshot), len(snapshot.films)

    def ask(self, version: int, method: str, arguments: tuple[Any, ...]) -> Any:
        """Calls a method of `Shard`, or raises InputError if the version no longer exists."""
        shard = self._shards.get(version) or self._open(version)
        if len(self._shards) > 1 and time.monotonic() > self._load_time + KEPT_SECONDS:
            self._forget(version)
        return getattr(shard, method)(*arguments)

    def _open(self, version: int) -> Shard:
        with self._lock:
            if version not in self._shards:
                former = self._shards[max(self._shards)].snapshot if self._shards else None
                options: Any = {"former": former, "version": version}
                snapshot = self._store.snapshot(self._part, **options)
                shard = Shard(snapshot, self._scorer)
                # A new dict, as queries read it at the same time.
                self._shards, self._load_time = {**self._shards, version: shard}, time.monotonic()
                self._prefetching.set()
                self._prefetching = snapshot.prefetch()
            return self._shards[version]

    def _forget(self, version: int) -> None:
        """Drops other versions if this one is the latest, as it is the one that is searched."""
        with self._lock:
            if version == max(self._shards):
                self._shards = {version: self._shards[version]}

    def _warm_up(self) -> None:
        """Compiles what queries use: a part that compiles counts as lost."""
        shard, config = next(iter(self._shards.values())), self._scorer.model.config
        rows = shard.snapshot.row_ids[:1]
        if not len(rows):
            return
        vector_1xD = np.ones((1, shard.snapshot.vectors.dim), np.float32)
        query = self._scorer.make_example(vector_1xD)
        shard.score(rows, query, by_example=True)
        if config.aggregation == "weighted":
            weights = np.zeros(query.mask.shape, np.float32)
            query = TextFeatures(query.sentence, query.words, query.mask, weights)
        shard.score(rows, query, by_example=False)
        if self._scorer.word_model:
            shard.score_words(rows, query)
