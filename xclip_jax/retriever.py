"""The Python API: a trained model with its tokenizer and the video reader."""

import os
from typing import NamedTuple

import numpy as np

from xclip_jax.checkpoint import load_model, model_folder
from xclip_jax.cli import InputError
from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.video import VideoError, preprocess, read_frames
from xclip_jax.inference import (
    concatenate_features,
    encode_texts,
    encode_videos,
    similarity_in_blocks,
)
from xclip_jax.similarity import TextFeatures, VideoFeatures

_BATCH = 32  # videos whose frames are held in memory at once


class Match(NamedTuple):
    """A video found: its place in what was searched, what was given there, the logit."""

    index: int
    video: object
    score: float


class Retriever:
    """Encodes texts and videos and compares them.

    Attributes:
        config: the architecture, a plain dict (model.json).
        model: the linen module.
        params: its parameters.
        tokenizer: text -> ids and mask, or None.
    """

    def __init__(self, config, model, params, tokenizer=None):
        self.config, self.model, self.params, self.tokenizer = config, model, params, tokenizer

    def encode_text(self, texts):
        """TextFeatures of T texts.

        Args:
            texts: a list of str; longer ones than the model's max_words are cut.

        Raises:
            InputError: `texts` is empty or a lone string, or the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(
                "this model directory has no tokenizer; convert the checkpoint again with --vocab, "
                "or set retriever.tokenizer = xclip_jax.load_tokenizer(FOLDER, max_words)"
            )
        texts = [] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError("encode_text wants a list of at least one text, each a str")
        return encode_texts(self.model, self.params, *self.tokenizer(texts))

    def encode_video(self, videos):
        """VideoFeatures of V videos.

        Args:
            videos: a list of paths, or of frame arrays F x H x W x 3: uint8 RGB of any size, or
                float of the model's image size, already normalised. More than max_frames frames
                are thinned out uniformly.

        Raises:
            InputError: `videos` is empty or a lone path, a file cannot be read (named, with the
                reason), or an array has another shape.
        """
        if isinstance(videos, str | os.PathLike) or not len(videos):
            raise InputError("encode_video wants a list of at least one path or frame array")

        def encoded():
            for start in range(0, len(videos), _BATCH):
                frames, masks = zip(*map(self._frames, videos[start : start + _BATCH]), strict=True)
                if len({array.dtype for array in frames}) > 1:
                    raise InputError("frame arrays of one call must be all uint8 or all float")
                yield encode_videos(self.model, self.params, np.stack(frames), np.stack(masks))

        return concatenate_features(encoded(), len(videos))

    def similarity(self, text, video):
        """T x V logits, NumPy float32: rows texts, columns videos (Eq. 14, scaled).

        Raises:
            InputError: `text` are not TextFeatures or `video` are not VideoFeatures.
        """
        if not (isinstance(text, TextFeatures) and isinstance(video, VideoFeatures)):
            given = f"{type(text).__name__} and {type(video).__name__}"
            raise InputError(f"similarity wants TextFeatures and VideoFeatures, not {given}")
        return similarity_in_blocks(self.model, self.params, text, video)

    def search(self, query, videos, k=5):
        """The k videos that fit a sentence best, best first.

        Args:
            query: a str.
            videos: what `encode_video` takes, or its result.
            k: how many; all if there are fewer.

        Returns:
            A list of Match(index, video, score); `video` is None when features were given.

        Raises:
            InputError: `query` is no str, `k` no whole number of at least 0, or see `encode_video`.
        """
        if not isinstance(query, str) or not isinstance(k, int) or k < 0:
            raise InputError(f"search wants a str and a whole number k >= 0, not {query!r}, {k!r}")
        features = videos if isinstance(videos, VideoFeatures) else self.encode_video(videos)
        scores_V = self.similarity(self.encode_text([query]), features)[0]
        given = [None] * len(scores_V) if features is videos else videos
        order = np.argsort(-scores_V, kind="stable")[:k]
        return [Match(int(v), given[v], float(scores_V[v])) for v in order]

    def _frames(self, video):
        """(F x S x S x 3, mask F) of one path or array, F = max_frames; as float if given float."""
        side, most = self.model.config.vision.image_size, self.model.config.max_frames
        if isinstance(video, str | os.PathLike):
            try:
                images = read_frames(video, side).frames
            except (VideoError, OSError) as error:
                raise InputError(f"{video}: {error}") from None
        else:
            images = np.asarray(video)
            if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
                raise InputError(
                    f"frames of shape {images.shape}: must be F x H x W x 3, none of them 0"
                )
            if not np.isfinite(images).all():
                raise InputError("float frames hold NaN or infinite values")
            if images.dtype != np.uint8 and images.shape[1:3] != (side, side):
                raise InputError(f"float frames must be {side} x {side} pixels and normalised")
        chosen = [images[index] for index in choose_frames(len(images), most)]
        if chosen[0].shape[:2] != (side, side):
            chosen = [preprocess(image, side) for image in chosen]
        frames = np.zeros((most, side, side, 3), chosen[0].dtype)
        frames[: len(chosen)] = chosen
        return frames, np.arange(most) < len(chosen)


def load(directory):
    """A Retriever from a model directory, or from a work directory (its `model`).

    Raises:
        InputError: there is no model, or it is damaged.
    """
    return Retriever(*load_model(model_folder(directory)))
