"""An index of videos: add files, ask with a sentence, a video or a picture."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import threading
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps

from xclip_jax.checkpoint import model_folder
from xclip_jax.cli import InputError
from xclip_jax.data.video import VIDEO_SUFFIXES
from xclip_jax.evaluate import words_of
from xclip_jax.inference import apply_model, on_local_devices
from xclip_jax.retriever import load
from xclip_jax.search.funnel import Funnel, Stopwatch, example_funnel, example_text
from xclip_jax.search.indexing import add_files, below
from xclip_jax.search.results import Answer, Attention, Hit
from xclip_jax.search.store import Store

SEGMENT_SECONDS = 30
PRECISIONS = ("float32", "float16")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class Index:
    """Segments of videos with their features, and the model that made them.

    Safe to be asked by several threads, and while another process adds to it: see `refresh`.

    Attributes:
        widths: (candidates, rerank), see xclip_jax.search.funnel.
    """

    def __init__(self, store, model=None, candidates=5000, rerank=200):
        if candidates < 1 or rerank < 1:
            raise InputError(f"candidates = {candidates}, rerank = {rerank}: must be at least 1")
        self._store, self._given_model = store, model
        self.widths = candidates, rerank
        self._lock = threading.Lock()
        self._snapshot = store.snapshot()

    @classmethod
    def open(cls, location, model=None, candidates=5000, rerank=200):
        """The index at `location`.

        Args:
            location: a folder, or a URI of a bucket (s3://, gs://, az://).
            model: a model or work directory; None: where it was when the index was made.
            candidates, rerank: segments scored without and with their frames.

        Raises:
            InputError: there is none, it is damaged, or it was made with another model.
        """
        index = cls(Store(location), model, candidates, rerank)
        if model is not None:
            index.retriever  # noqa: B018  (checked now, not at the first question)
        return index

    @classmethod
    def create(
        cls, location, model, segment_seconds=SEGMENT_SECONDS, shots=False, precision="float32"
    ):
        """Makes an empty index.

        Args:
            location: see `open`.
            model: a model or work directory.
            segment_seconds: whole seconds of a segment, at least 1.
            shots: whether to cut at changes of shot, no segment longer than that.
            precision: of the stored features, "float32", or "float16": half the disk, logits to
                about 0.01.

        Raises:
            InputError: there is one already, or no model.
        """
        if not isinstance(segment_seconds, int) or segment_seconds < 1:
            raise InputError(f"segment_seconds = {segment_seconds}: must be a whole number from 1")
        if precision not in PRECISIONS:
            raise InputError(f"precision = {precision!r}: must be {' or '.join(PRECISIONS)}")
        retriever = load(model)
        about = {
            "model": _where(model),
            "fingerprint": fingerprint(retriever),
            "max_frames": retriever.model.max_frames,
            "embed_dim": retriever.model.embed_dim,
            "segment_seconds": segment_seconds,
            "shots": shots,
            "precision": precision,
        }
        return cls(Store.create(location, about), model)

    def __len__(self):
        return self.num_segments

    @property
    def location(self):
        """Its folder or URI."""
        return self._store.location

    @property
    def about(self):
        """What it was made with: model, fingerprint, segment_seconds, precision."""
        return self._store.about

    @property
    def num_segments(self):
        """Of the version that questions see."""
        return len(self._snapshot)

    @property
    def num_files(self):
        """Likewise."""
        return self._snapshot.num_files

    @property
    def model_name(self):
        """Where the model is."""
        return self.about["model"] if self._given_model is None else _where(self._given_model)

    @functools.cached_property
    def retriever(self):
        """The model, see xclip_jax.retriever.

        Raises:
            InputError: it is not there, or not the one that the index was made with.
        """
        made_with = self.about["model"]
        if self._given_model is None and not Path(made_with).is_dir():
            raise InputError(
                f"the model of {self.location} is no longer in {made_with}: say where with --model"
            )
        retriever = load(self.model_name)
        found = fingerprint(retriever)
        if found != self.about["fingerprint"]:
            raise InputError(
                f"{self.location} was made with the model {made_with} "
                f"({self.about['fingerprint']}), not with {self.model_name} ({found}): "
                "vectors of two models cannot be compared"
            )
        retriever.params = on_local_devices(retriever.params)
        return retriever

    def add(self, videos, prune=False):
        """Takes in video files, and folders of them with their sub-folders.

        Files that are in it unchanged (size and time of change) are left alone, changed ones are
        read again. What is done when it is interrupted stays; a second call does the rest.

        Args:
            videos: paths, or one.
            prune: whether what is known of files that are gone from these folders is removed.

        Returns:
            Added, see xclip_jax.search.indexing.

        Raises:
            InputError: no video is found.
        """
        added = add_files(self._store, self.retriever, _listed(videos), prune)
        self.refresh()
        return added

    def remove(self, videos):
        """Forgets files, and all below folders; returns how many segments that took out.

        Args:
            videos: paths, or one; of what need not be there any more.
        """
        self.refresh()
        before, videos = self.num_segments, _listed(videos)
        self._store.remove([path for path in self._store.files() if below(path, videos)])
        self.refresh()
        return before - self.num_segments

    def refresh(self):
        """Lets questions see what has been committed since; returns whether there was anything."""
        with self._lock:
            if self._store.version() == self._snapshot.version:
                return False
            self._snapshot = self._store.snapshot()
            return True

    def query(self, text, k=10, path=None, start=None, end=None, exhaustive=False, bar=None):
        """The segments that fit a sentence best.

        Args:
            text: the sentence.
            k: how many; all there are if fewer.
            path: only files of this name: a part of the path, or a pattern with * and ?.
            start, end: only segments that reach into this part of their file, seconds.
            exhaustive: score every segment by the whole model.
            bar: optional progress bar over segments, for `exhaustive`.

        Returns:
            Answer.

        Raises:
            InputError: the sentence is empty, k is below 1, or the model has no tokenizer.
        """
        if exhaustive:
            return self.query_exhaustively([text], k, path, start, end, bar)[0]
        watch = Stopwatch()
        features = self._encode([text])
        watch("encoding")
        return self._search(self._funnel, features, k, (path, start, end), watch, self._note(text))

    def query_exhaustively(self, texts, k=10, path=None, start=None, end=None, bar=None):
        """An Answer to each of T sentences, every segment scored by the whole model."""
        watch = Stopwatch()
        features = self._encode(texts)
        watch("encoding")
        snapshot, allowed, searched = self._choose(k, (path, start, end))
        found = self._funnel.exhaustive(snapshot, features, k, allowed, bar)
        return [
            Answer(_hits(snapshot, one), watch.seconds | one.seconds, searched, self._note(text))
            for text, one in zip(texts, found, strict=True)
        ]

    def similar(self, file, k=10, path=None, start=None, end=None):
        """The segments that resemble a video or a picture; options as of `query`.

        The score is a logit: the mean of video-video and video-frame similarity.

        Raises:
            InputError: the file cannot be read, or its name is not that of a video or a picture.
        """
        # A playlist would have FFmpeg read other files, and who sent it would learn of them.
        if Path(file).suffix.lower() not in (*VIDEO_SUFFIXES, *_IMAGE_SUFFIXES):
            raise InputError(f"{file}: its name is not that of a video or a picture")
        watch = Stopwatch()
        video = self.retriever.encode_video([_picture(file) if _is_picture(file) else file])
        watch("encoding")
        return self._alike(video.video[0], k, (path, start, end), watch)

    def like(self, segment_id, k=10):
        """The segments that resemble one of the index, itself left out; KeyError if unknown."""
        if k < 1:
            raise InputError(f"k = {k}: must be at least 1")
        snapshot = self._snapshot
        vector = snapshot.features([snapshot.row(segment_id)]).video[0]
        answer = self._alike(vector, k + 1, (None, None, None), Stopwatch())
        others = [hit for hit in answer if hit.id != segment_id][:k]
        hits = [dataclasses.replace(hit, rank=rank) for rank, hit in enumerate(others, 1)]
        return Answer(hits, answer.seconds, answer.searched)

    def rank_captions(self, video, captions):
        """[(caption, logit)] of T sentences for one video file, the best first (video to text)."""
        text = self.retriever.encode_text(captions)
        scores_T = self.retriever.similarity(text, self.retriever.encode_video([video]))[:, 0]
        order = np.argsort(-scores_T, kind="stable")
        return [(captions[index], float(scores_T[index])) for index in order]

    def attention(self, segment_id, text):
        """How AOSM spreads its attention over a sentence and a segment; KeyError if unknown.

        Raises:
            InputError: the model has no word-frame similarity.
        """
        model = self.retriever.model
        if model.fusion != "mean" or "frame_word" not in model.granularities:
            raise InputError("the model compares no words with frames: there is no heat map")
        snapshot = self._snapshot
        row = [snapshot.row(segment_id)]
        one, video = self.retriever.encode_text([text]), snapshot.features(row)
        weights = apply_model(self.retriever.params, one, video, model=model, method=_ATTENTION)[0]
        words, words_W = words_of(model, self.retriever.tokenizer, text, one.mask[0])
        shown_F = video.mask[0]
        weights_WxF = np.asarray(weights)[words_W][:, shown_F]
        return Attention(words, snapshot.times[row[0], shown_F].tolist(), weights_WxF)

    def tables(self):
        """Yields Arrow tables, block by block, of all that is kept but the thumbnails."""
        return self._snapshot.tables()

    def segment(self, segment_id):
        """The segment as a Hit of rank 0 and score 0; KeyError if there is none."""
        snapshot = self._snapshot
        row = snapshot.row(segment_id)
        start, end = float(snapshot.starts[row]), float(snapshot.ends[row])
        return Hit(0, 0.0, segment_id, snapshot.paths[row].as_py(), start, end, start)

    def thumbnail(self, segment_id):
        """Its picture, JPEG; KeyError if there is none."""
        snapshot = self._snapshot
        return snapshot.read([snapshot.row(segment_id)], ["thumbnail"])["thumbnail"][0].as_py()

    @functools.cached_property
    def _funnel(self):
        retriever = self.retriever
        return Funnel(retriever.model, retriever.params, *self.widths)

    def warm_up(self):
        """Compiles what questions need, so that the first one need not wait for it."""
        for hit in self.query("a", k=1):
            self.like(hit.id, k=1)
            with contextlib.suppress(InputError):
                self.attention(hit.id, "a")

    def _encode(self, texts):
        if not all(isinstance(text, str) for text in texts):
            raise InputError("a sentence must be a str")
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # no half characters
        if not all(text.split() for text in texts):
            raise InputError("the sentence is empty")
        return self.retriever.encode_text(texts)

    def _note(self, text):
        tokenizer = self.retriever.tokenizer
        if not tokenizer.truncated(text):
            return None
        return f"only the first {tokenizer.max_words - 2} tokens of the sentence were used"

    def _alike(self, vector_D, k, where, watch):
        text = example_text(vector_D, self.retriever.model.max_words)
        return self._search(example_funnel(self._funnel), text, k, where, watch)

    def _search(self, funnel, text, k, where, watch, note=None):
        """The Answer to a query that has been encoded."""
        snapshot, allowed, searched = self._choose(k, where)
        try:
            found = funnel.search(snapshot, text, k, allowed)
        except InputError:  # a writer has joined this version's files with others, long ago
            if not self.refresh():
                raise
            return self._search(funnel, text, k, where, watch, note)
        return Answer(_hits(snapshot, found), watch.seconds | found.seconds, searched, note)

    def _choose(self, k, where):
        """(the snapshot to search, which of its rows or None for all, how many these are)."""
        if not isinstance(k, int) or k < 1:
            raise InputError(f"k = {k!r}: must be a whole number, at least 1")
        snapshot = self._snapshot
        allowed = snapshot.matching(*where)
        return snapshot, allowed, len(snapshot) if allowed is None else int(allowed.sum())


_ATTENTION = "word_frame_attention"


def _hits(snapshot, found):
    columns = (snapshot.ids, snapshot.paths, snapshot.starts, snapshot.ends)
    return [
        Hit(rank, float(score), *(_plain(column[row]) for column in columns), float(moment))
        for rank, (row, score, moment) in enumerate(
            zip(found.rows.tolist(), found.scores, found.moments, strict=True), start=1
        )
    ]


def _plain(value):
    """A Python value of Arrow's or NumPy's."""
    return value.as_py() if hasattr(value, "as_py") else value.item()


def _is_picture(file):
    return Path(file).suffix.lower() in _IMAGE_SUFFIXES


def _picture(file):
    """A picture as a video of one frame, 1 x H x W x 3."""
    try:
        with Image.open(file) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
    except Exception as error:  # of Pillow's readers each raises what it likes
        raise InputError(f"{file}: no picture that can be read: {error}") from None


def _listed(paths):
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def _where(model):
    return os.path.abspath(model_folder(model))


def fingerprint(retriever):
    """16 hexadecimal digits of all that a model's features depend on: architecture and numbers."""
    ignored = ("step", "selected_on", "remat")
    about = {name: value for name, value in retriever.config.items() if name not in ignored}
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8)
    for path, array in jax.tree_util.tree_leaves_with_path(retriever.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
