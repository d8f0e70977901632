"""The Python API: a trained model with its tokenizer and the video reader."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

from xclip_jax.checkpoint import load_model, model_folder
from xclip_jax.cli import InputError
from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.text import Tokenizer
from xclip_jax.data.video import VideoError, preprocess, read_frames
from xclip_jax.inference import (
    concatenate_features,
    encode_texts,
    encode_videos,
    similarity_in_blocks,
)
from xclip_jax.models import XClip
from xclip_jax.similarity import TextFeatures, VideoFeatures

Video = str | os.PathLike | np.ndarray
_BATCH = 32  # videos whose frames are in memory at once


class Match(NamedTuple):
    """A search result: index of the video, the video as passed, its logit."""

    index: int
    video: Video | None
    score: float


class Retriever:
    """A video-text model that encodes texts and videos and compares them.

    Attributes:
        config: the content of model.json.
        model: the linen module.
        params: its parameters.
        tokenizer: turns texts into ids and a mask; None if the model directory has none.
    """

    def __init__(
        self, config: dict[str, Any], model: XClip, params: Any, tokenizer: Tokenizer | None = None
    ) -> None:
        self.config, self.model, self.params, self.tokenizer = config, model, params, tokenizer

    def get_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer, or raises InputError if there is none."""
        if self.tokenizer is None:
            raise InputError(
                "this model directory has no tokenizer: convert the checkpoint again with --vocab, "
                "or set retriever.tokenizer = xclip_jax.load_tokenizer(FOLDER, max_words)"
            )
        return self.tokenizer

    def encode_text(self, texts: Sequence[str]) -> TextFeatures:
        """Encodes T texts.

        Args:
            texts: at least one text; longer ones than max_words tokens are truncated.

        Returns:
            NumPy arrays: L2-normalised (except under the `tight_transformer` head) sentence T x D
            and words T x W x D, mask T x W (True: real token, start and end included).

        Raises:
            InputError: `texts` is empty or a single string, or the model has no tokenizer.
        """
        tokenizer = self.get_tokenizer()
        texts = [] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError("encode_text: texts must be a list of at least one str")
        return encode_texts(self.model, self.params, *tokenizer(texts))

    def encode_video(self, videos: Sequence[Video]) -> VideoFeatures:
        """Encodes V videos.

        Args:
            videos: paths, or frames as arrays F x H x W x 3: uint8 RGB of any size, or float,
                normalised, of the model's image size. Of more than max_frames frames, max_frames
                uniformly spaced ones are used.

        Returns:
            NumPy arrays: L2-normalised (except under the `tight_transformer` head) video V x D and
            frames V x F x D, mask V x F (True: real frame).

        Raises:
            InputError: `videos` is empty or a single path, a file cannot be read, or an array has
                the wrong shape or values.
        """
        if isinstance(videos, str | os.PathLike) or not len(videos):
            raise InputError("encode_video: videos must be a list of at least one path or array")

        def encode_batches() -> Iterator[VideoFeatures]:
            for start in range(0, len(videos), _BATCH):
                frames, masks = zip(*map(self._read, videos[start : start + _BATCH]), strict=True)
                if len({array.dtype for array in frames}) > 1:
                    raise InputError("encode_video: arrays must be all uint8 or all float")
                yield encode_videos(self.model, self.params, np.stack(frames), np.stack(masks))

        return concatenate_features(encode_batches(), len(videos))

    def similarity(self, text: TextFeatures, video: VideoFeatures) -> Float[np.ndarray, "T V"]:
        """Returns T x V float32 logits: cosine-like similarities (Eq. 14) times exp(logit_scale).

        Raises:
            InputError: an argument has the wrong type.
        """
        if not (isinstance(text, TextFeatures) and isinstance(video, VideoFeatures)):
            types = f"{type(text).__name__} and {type(video).__name__}"
            raise InputError(f"similarity: {types}: must be TextFeatures and VideoFeatures")
        return similarity_in_blocks(self.model, self.params, text, video)

    def search(
        self, query: str, videos: Sequence[Video] | VideoFeatures, k: int = 5
    ) -> list[Match]:
        """Returns the k videos most similar to a text, in descending order of score.

        Args:
            query: the text.
            videos: videos as for `encode_video`, or its result.
            k: number of matches; all videos if there are fewer.

        Returns:
            Matches (index, video, score); `video` is None if features were passed.

        Raises:
            InputError: `query` is not a str, `k` is not an integer of at least 0, or as in
                `encode_video`.
        """
        if not isinstance(query, str) or not isinstance(k, int) or k < 0:
            raise InputError(
                f"search: {query!r}, k = {k!r}: must be a str and an int of at least 0"
            )
        if isinstance(videos, VideoFeatures):
            features, sources = videos, [None] * len(videos.mask)
        else:
            features, sources = self.encode_video(videos), videos
        scores_V = self.similarity(self.encode_text([query]), features)[0]
        order = np.argsort(-scores_V, kind="stable")[:k]
        return [Match(int(v), sources[v], float(scores_V[v])) for v in order]

    def _read(self, video: Video) -> tuple[Shaped[np.ndarray, "F S S 3"], Bool[np.ndarray, " F"]]:
        """Returns max_frames preprocessed frames of a video, zero-padded, and their mask."""
        side, max_frames = self.model.config.vision.image_size, self.model.config.max_frames
        if isinstance(video, str | os.PathLike):
            try:
                images = read_frames(video, side).frames
            except (VideoError, OSError) as error:
                raise InputError(f"{video}: {error}") from None
        else:
            images = np.asarray(video)
            if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
                raise InputError(
                    f"frames of shape {images.shape}: must be F x H x W x 3 without zero sizes"
                )
            if not np.isfinite(images).all():
                raise InputError("float frames contain NaN or infinite values")
            if images.dtype != np.uint8 and images.shape[1:3] != (side, side):
                raise InputError(f"float frames must be {side} x {side} pixels and normalised")
        chosen = [images[index] for index in choose_frames(len(images), max_frames)]
        if chosen[0].shape[:2] != (side, side):
            chosen = [preprocess(image, side) for image in chosen]
        frames = np.zeros((max_frames, side, side, 3), chosen[0].dtype)
        frames[: len(chosen)] = chosen
        return frames, np.arange(max_frames) < len(chosen)


def load(directory: str | os.PathLike) -> Retriever:
    """Loads a model directory, or the `model` of a work directory.

    Raises:
        InputError: there is no model, or it is corrupted.
    """
    return Retriever(*load_model(model_folder(directory)))
