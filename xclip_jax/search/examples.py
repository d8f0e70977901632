"""Reads the video or image that a search starts from."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from xclip_jax.cli import InputError, PathLike
from xclip_jax.data.container import VideoError
from xclip_jax.data.extraction import VIDEO_SUFFIXES
from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.preprocess import frame_format, read_image
from xclip_jax.data.video import Limits, read_frames
from xclip_jax.models import ModelConfig

EXAMPLE_SECONDS = 600.0  # of a video that is an example
EXAMPLE_LIMITS = Limits(pixels=2**24, working_seconds=4)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def read_example(file: PathLike, config: ModelConfig) -> Shaped[np.ndarray, "F H W 3"]:
    """Returns the frames of an image (F = 1) or of the start of a video, for `encode_video`.

    Raises InputError if the file cannot be read within EXAMPLE_LIMITS, or its suffix is not that of
    a video or an image.
    """
    suffix = Path(file).suffix.lower()
    if suffix in _IMAGE_SUFFIXES:
        try:
            return read_image(file)[None]
        except Exception as error:  # Pillow's plugins raise many types
            raise InputError(f"{file}: cannot be read as an image: {error}") from None
    if suffix not in VIDEO_SUFFIXES:  # FFmpeg would disclose the files that a playlist names
        raise InputError(f"{file}: suffix must be that of a video or an image")
    options: Any = {"end": EXAMPLE_SECONDS, "limits": EXAMPLE_LIMITS}
    try:
        frames = read_frames(file, frame_format(config), **options).frames
        return np.stack([frames[index] for index in choose_frames(len(frames), config.max_frames)])
    except VideoError as error:
        raise InputError(f"{file}: {error}") from None
