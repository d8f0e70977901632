"""The Python API: a trained model with its tokenizer and the video reader."""

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped
from tqdm import tqdm

from xclip_jax import inference
from xclip_jax.checkpoint import load_model, model_folder
from xclip_jax.cli import InputError
from xclip_jax.comparison import compare_all
from xclip_jax.convert.cache import convert_once
from xclip_jax.convert.reading import is_importable
from xclip_jax.data.container import VideoError
from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.preprocess import frame_format, preprocess
from xclip_jax.data.tokenizer import Tokenizer, is_blank
from xclip_jax.data.video import read_frames
from xclip_jax.models import XClip
from xclip_jax.models.config import PreprocessConfig
from xclip_jax.similarity import TextFeatures, VideoFeatures

Video = str | os.PathLike | np.ndarray
_VIDEOS = "path or F x H x W x 3 array", (str, os.PathLike, np.ndarray, jax.Array)
_BATCH = 32  # videos whose frames are in memory at once


class Match(NamedTuple):
    """A search result: index of the video, the video as passed, its logit."""

    index: int
    video: Video | None
    score: float


@dataclass(eq=False, repr=False)
class Retriever:
    """A video-text model that encodes texts and videos and compares them."""

    config: dict[str, Any]  # the content of model.json
    model: XClip  # the linen module
    params: Any
    tokenizer: Tokenizer | None = None

    @property
    def scale(self) -> float:
        """The factor from cosines to logits, or 1.0 if a Transformer scores pairs."""
        if not self.model.config.has_granularities:
            return 1.0
        return float(self._apply(_get_scale))

    def get_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer, or raises InputError if there is none."""
        if self.tokenizer is None:
            advice = "set retriever.tokenizer = xclip_jax.load_tokenizer(FOLDER, max_words)"
            raise InputError(f"the model has no tokenizer: convert again with --vocab, or {advice}")
        return self.tokenizer

    def encode_text(self, texts: Iterable[str], size: int = 64) -> TextFeatures:
        """Encodes at least one text, truncated to max_words tokens, `size` texts at a time.

        Returns:
            NumPy arrays: L2-normalised (except under the `tight_transformer` head) sentence T x D
            and words T x W x D, mask T x W (True: real token, special ones included).

        Raises:
            InputError: `texts` is empty or a single string, a text shows nothing (see `is_blank`),
                `size` is below 1, or the model has no tokenizer of its length.
        """
        self.require("text", "encode_text")
        tokenizer, max_words = self.get_tokenizer(), self.model.config.max_words
        texts = _to_list("encode_text: texts", texts, "str", (str,))
        if blank := [text for text in texts if is_blank(text)]:
            raise InputError(f"encode_text: {blank[0]!r:.99} shows nothing once it is cleaned")
        if not isinstance(size, int) or size < 1:
            raise InputError(f"encode_text: size = {size!r}: must be a whole number of at least 1")
        if tokenizer.max_words != max_words:
            problem = f"the tokenizer has max_words = {tokenizer.max_words}"
            raise InputError(f"encode_text: {problem}, the model has {max_words}")
        return self.encode("encode_text", tokenizer(texts), size)

    def encode_video(self, videos: Iterable[Video]) -> VideoFeatures:
        """Encodes V videos, of each at most max_frames uniformly spaced frames.

        With preprocess.spread (VideoPrism) it is max_frames of each, spread over the whole video,
        some of them repeatedly if there are fewer.

        Args:
            videos: paths, or frames as arrays F x H x W x 3: uint8 RGB, preprocessed
                unless it has the model's image size, or float, of the model's image size and
                normalised with its mean and deviation (CLIP: -1.8 to 2.2, SigLIP: -1 to 1,
                VideoPrism: 0 to 1).

        Returns:
            NumPy arrays: L2-normalised (except under the `tight_transformer` head) video V x D and
            frames V x F x D, mask V x F (True: real frame).

        Raises:
            InputError: `videos` is empty or a single path, a file cannot be read, or an array has
                the wrong type, shape or values.
        """
        self.require("vision", "encode_video")
        videos = _to_list("encode_video: videos", videos, *_VIDEOS)

        def encode_batches() -> Iterator[VideoFeatures]:
            for start in range(0, len(videos), _BATCH):
                frames, masks = zip(*map(self._read, videos[start : start + _BATCH]), strict=True)
                if len({array.dtype for array in frames}) > 1:
                    raise InputError("encode_video: arrays must be all uint8 or all float")
                yield self.encode("encode_video", (np.stack(frames), np.stack(masks)), _BATCH)

        return inference.concatenate_features(encode_batches(), len(videos))

    def encode(self, method: str, inputs: tuple[np.ndarray, np.ndarray], size: int) -> Any:
        """Encodes preprocessed texts or videos, `size` at a time, and returns NumPy features.

        Args:
            method: encode_text or encode_video, of XClip.
            inputs: ids T x W or frames V x F x S x S x 3, and their mask, T x W or V x F.
            size: rows encoded at once; remaining ones are encoded in powers of four.

        Raises:
            ValueError: there is nothing to encode.
        """
        if not (total := len(inputs[0])):
            raise ValueError("must have at least one text or video to encode")

        def encode_batches() -> Iterator[Any]:
            for start, count in inference.split_counts(total, size):
                rows = inference.slice_rows(inputs, start, count)
                yield self._apply(method, *inference.split_like(rows, self.params))

        batches = inference.one_ahead(encode_batches())
        return inference.concatenate_features((jax.device_get(one) for one in batches), total)

    def require(self, tower: str, what: str) -> None:
        """Raises InputError if the model, a half of one, lacks the tower "text" or "vision"."""
        if (towers := self.model.config.towers) not in ("both", tower):
            raise InputError(f"{what}: the model has a {towers} tower only")

    def _apply(self, method: Any, *inputs: Any) -> Any:
        return inference.apply_model(self.params, *inputs, model=self.model, method=method)

    def attention(
        self, caption: str, text: TextFeatures, video: VideoFeatures
    ) -> tuple[list[str], Float[np.ndarray, "W F"]]:
        """Returns the words of a caption, and AOSM's weights of them and a video's real frames.

        `text` and `video` are the features of this caption and this video, T = V = 1. Words are the
        real tokens that take part in AOSM.
        """
        weights, mask_W = self._apply("word_frame_attention", text, video), np.asarray(text.mask[0])
        words_W = np.asarray(self.model.aosm_words(text.mask)[0]) & mask_W
        tokenizer, count = self.get_tokenizer(), mask_W.sum()
        num_starts, num_ends = tokenizer.special_tokens
        words = tokenizer.tokens(caption)[: count - num_starts - num_ends]
        tokens = [*["start"] * num_starts, *words, *["end"] * num_ends]
        words = list(itertools.compress(tokens, words_W))
        return words, np.asarray(weights)[0, words_W][:, np.asarray(video.mask[0])]

    def compare_words(
        self, caption: str, text: TextFeatures, video: VideoFeatures
    ) -> tuple[list[str], Float[np.ndarray, "N F"]]:
        """Returns the N words of a caption, and their cosines with a video's real frames.

        These are means over the tokens of a word. `text` and `video` are as in `attention`. There
        are no words if the model does not compare words with frames.
        """
        config, tokenizer = self.model.config, self.get_tokenizer()
        frames_FxD = np.asarray(video.frames)[0, np.asarray(video.mask)[0]].astype(np.float32)
        if not config.has_granularities or "frame_word" not in config.granularities:
            return [], np.zeros((0, len(frames_FxD)), np.float32)
        num_starts, num_ends = tokenizer.special_tokens
        end = int(np.sum(text.mask)) - num_ends
        cosines_WxF = np.asarray(text.words)[0, num_starts:end] @ frames_FxD.T
        words, rows, place = [], [], 0
        for word, count in tokenizer.words(caption):
            if place < len(cosines_WxF):  # the rest was truncated
                words.append(word)
                rows.append(cosines_WxF[place : place + count].mean(0))
            place += count
        return words, np.reshape(rows, (len(words), len(frames_FxD))).astype(np.float32)

    def similarity(
        self,
        text: TextFeatures,
        video: VideoFeatures,
        *,
        block_cells: int = 0,
        bar: tqdm | None = None,
    ) -> Float[np.ndarray, "T V"]:
        """Returns T x V float32 logits: cosine-like similarities (Eq. 14) times exp(logit_scale).

        Args:
            text, video: NumPy features of T texts and V videos.
            block_cells: word-frame cells computed at once; 0: chosen for the device.
            bar: progress bar, advanced by the number of pairs.

        Raises:
            InputError: an argument has the wrong type, or is of another model.
        """
        return self._compare("similarity", text, video, block_cells, bar)["all"]

    def similarities(
        self,
        text: TextFeatures,
        video: VideoFeatures,
        *,
        block_cells: int = 0,
        bar: tqdm | None = None,
    ) -> dict[str, Float[np.ndarray, "T V"]]:
        """Returns `similarity` as "all" and the same logits of each granularity alone by its name.

        Arguments and errors are those of `similarity`. A model that scores pairs with a Transformer
        has "all" only.
        """
        method = "similarities" if self.model.config.has_granularities else "similarity"
        sims = self._compare(method, text, video, block_cells, bar)
        names = [*self.model.config.granularities, "all"]
        return {name: sims[name] for name in names if name in sims}

    def _compare(
        self,
        method: str,
        text: TextFeatures,
        video: VideoFeatures,
        block_cells: int,
        bar: tqdm | None,
    ) -> dict[str, Float[np.ndarray, "T V"]]:
        """Computes the T x V logits of a method in blocks, by name, a single one as "all"."""
        if not (isinstance(text, TextFeatures) and isinstance(video, VideoFeatures)):
            types = f"{type(text).__name__} and {type(video).__name__}"
            raise InputError(f"similarity: {types}: must be TextFeatures and VideoFeatures")
        if not isinstance(block_cells, int) or block_cells < 0:
            problem = f"similarity: block_cells = {block_cells!r:.99}"
            raise InputError(f"{problem}: must be a whole number of at least 0")
        dim = self.model.config.embed_dim
        _check_features("text", text, text.sentence, text.words, dim)
        _check_features("video", video, video.video, video.frames, dim)
        options: Any = {"method": method, "block_cells": block_cells, "bar": bar}
        return compare_all(self.model, self.params, (text, video), **options)

    def search(
        self, query: str, videos: Iterable[Video] | VideoFeatures, k: int = 5
    ) -> list[Match]:
        """Returns the k videos most similar to a text, or all, in descending order of score.

        `videos` are as for `encode_video`, or its result: then the matches have no `video`.

        Raises:
            InputError: `query` is not a str, `k` is below 0, or as in `encode_video`.
        """
        if not isinstance(query, str) or not isinstance(k, int | np.integer) or k < 0:
            problem = f"search: {query!r:.99}, k = {k!r:.99}"
            raise InputError(f"{problem}: must be a str and a whole number of at least 0")
        if isinstance(videos, VideoFeatures):
            features, sources = videos, [None] * len(videos.mask)
        else:
            sources = _to_list("search: videos", videos, *_VIDEOS)
            features = self.encode_video(sources)
        scores_V = self.similarity(self.encode_text([query]), features)[0]
        order = np.argsort(-scores_V, kind="stable")[:k]
        return [Match(int(v), sources[v], float(scores_V[v])) for v in order]

    def _read(self, video: Video) -> tuple[Shaped[np.ndarray, "F S S 3"], Bool[np.ndarray, " F"]]:
        """Returns max_frames preprocessed frames of a video, zero-padded, and their mask."""
        format, max_frames = frame_format(self.model.config), self.model.config.max_frames
        side, spread = format.image_size, format.spread > 0
        if isinstance(video, str | os.PathLike):
            try:
                images = read_frames(video, format).frames
            except (VideoError, OSError) as error:
                raise InputError(f"{video}: {error}") from None
        else:
            images = np.asarray(video)
            if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
                allowed = "must be F x H x W x 3 without zero sizes"
                raise InputError(f"frames of shape {images.shape}: {allowed}")
            if images.dtype != np.uint8:
                images = _check_normalised(images, side, self.model.config.preprocess)
        indices = choose_frames(len(images), max_frames, spread=spread)
        chosen = [images[index] for index in indices]
        if chosen[0].shape[:2] != (side, side):
            chosen = [preprocess(image, format) for image in chosen]
        frames = np.zeros((max_frames, side, side, 3), chosen[0].dtype)
        frames[: len(chosen)] = chosen
        return frames, np.arange(max_frames) < len(chosen)


def _get_scale(model: XClip) -> jax.Array:
    return model.clip.scale()


def _to_list(what: str, items: Any, kind: str, types: tuple[type, ...]) -> list[Any]:
    """Returns the items of an iterable as a list, or raises InputError if their type is wrong."""
    is_array = isinstance(items, np.ndarray | jax.Array)
    is_single = isinstance(items, types) and not (is_array and items.ndim == 5)
    items = [] if is_single or not isinstance(items, Iterable) else list(items)
    wrong = [type(item).__name__ for item in items if not isinstance(item, types)]
    if wrong or not items:
        found = f", not of {wrong[0]}" if wrong else ""
        raise InputError(f"{what} must be a list of at least one {kind}{found}")
    return items


def _check_features(kind: str, features: Any, one: Any, many: Any, dim: int) -> None:
    """Raises InputError if the arrays of features do not fit together or have another width."""
    shapes = [np.shape(array) for array in (one, many, features.mask)]
    count, length = shapes[2] if len(shapes[2]) == 2 else (0, 0)
    if shapes != [(count, dim), (count, length, dim), (count, length)] or not count:
        found = ", ".join(map(str, shapes))
        raise InputError(f"similarity: {kind} features of shapes {found} are not of this model")


def _check_normalised(
    images: np.ndarray, side: int, config: PreprocessConfig
) -> Float[np.ndarray, "F S S 3"]:
    """Returns frames as float32, or raises InputError if they cannot be normalised ones.

    Those are from -mean / std to (1 - mean) / std, and a little outside after bicubic resizing.
    """
    expected = f"must be uint8, or normalised floats of {side} x {side} pixels"
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"frames of type {images.dtype}: {expected}")
    images = images.astype(np.float64)
    if not np.isfinite(images).all():
        raise InputError(f"frames contain NaN or infinite values: {expected}")
    low, high = float(images.min()), float(images.max())
    mean, std = np.array(config.mean), np.array(config.std)
    is_unit = low > -0.1 and high < 1.1 and high > 0  # a little outside after bicubic resizing
    is_byte = low >= 0 and high > 1 and (images == images.round()).all()
    lowest, highest = ((-0.5 - mean) / std).min(), ((1.5 - mean) / std).max()
    if not lowest <= low <= high <= highest or is_byte or (is_unit and mean.any()):
        limits = f"float frames from {low:.3g} to {high:.3g}"
        raise InputError(f"{limits} are not normalised: {expected}")
    if images.shape[1:3] != (side, side):
        raise InputError(
            f"float frames of {images.shape[1]} x {images.shape[2]} pixels: {expected}"
        )
    return images.astype(np.float32)


def load(
    source: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> Retriever:
    """Loads a model directory, a work directory, or whatever `convert` takes.

    That is a PyTorch checkpoint, a Hugging Face folder or a hub id. It is converted once, to a
    folder in $XCLIP_JAX_CACHE or ~/.cache/xclip_jax; without options, which only
    `python -m xclip_jax.convert` has. What `push_to_hub` wrote needs no conversion.

    Args:
        source: path or hub id; `from_pretrained` is another name of this function.
        revision: branch, tag or commit of a hub id (default: its main branch).
        token: token of the hub (default: HF_TOKEN, or that of `hf auth login`).

    Raises:
        InputError: there is no model, or it is corrupted.
    """
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"load: {source!r:.99}: must be a path or a hub id")
    directory, source = model_folder(source), os.fspath(source)
    if revision is not None and directory.exists():
        raise InputError(f"load: revision = {revision!r}: {source} is a path, not a hub id")
    if is_importable(source) and not (directory / "model.json").is_file():
        try:
            directory = convert_once(source, revision, token)
        except InputError as error:
            advice = "; options are those of python -m xclip_jax.convert"
            raise InputError(f"{error}{advice * ('--' in str(error))}") from None
    config, model, params, tokenizer = load_model(directory)
    inference.note_compute_dtype(model.config)
    return Retriever(config, model, params, tokenizer)


from_pretrained = load
