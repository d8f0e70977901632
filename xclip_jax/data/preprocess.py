"""Makes frames from images as a model requires, and reads and writes image files."""

from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps

from xclip_jax.cli import PathLike, explain_no_file

if TYPE_CHECKING:
    from xclip_jax.models.config import ModelConfig
else:
    ModelConfig = Any  # its module imports JAX, without which the workers of `prepare` start

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow's others run programs (EPS)
MAX_ASPECT = 16  # long side / short side up to which the whole picture is resized
MAX_SCANS = 100  # of a progressive JPEG, which is decoded as often
MAX_IMAGE_PIXELS = 2**25  # 33 million: 100 MB as RGB
ONE = Fraction(1)
_FILTERS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "lanczos")}


class FrameFormat(NamedTuple):
    """Size of frames and the way they are made from a picture. The default is CLIP's."""

    image_size: int = 224  # S, side of a frame in pixels
    # crop: the short side becomes S, then the centre is taken. squash: both sides become S.
    resize: Literal["crop", "squash"] = "crop"
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    spread: int = 0  # number of frames, spread over the whole video; 0: one frame a second

    def __str__(self) -> str:
        times = f", {self.spread} spread over the whole video" if self.spread else ""
        return f"{self.image_size} px, {self.resize}, {self.interpolation}{times}"

    @property
    def key(self) -> tuple[int | str, ...]:
        """The fields that identify the format, as earlier versions hashed them.

        First there was `image_size` alone, later all but `spread`. Others are left out at their
        defaults.
        """
        if self == FrameFormat(self.image_size):
            return (self.image_size,)
        return tuple(self) if self.spread else tuple(self)[:3]


def frame_format(config: ModelConfig) -> FrameFormat:
    """Returns the format of the frames that a model is given."""
    p, spread = config.preprocess, config.max_frames if config.preprocess.spread else 0
    return FrameFormat(config.vision.image_size, p.resize, p.interpolation, spread)


def preprocess(
    image: Image.Image | UInt8[np.ndarray, "H W 3"],
    format: FrameFormat,
    pixel_aspect: Fraction = ONE,
) -> UInt8[np.ndarray, "S S 3"]:
    """Resizes a picture to S x S RGB in [0, 255], which is not normalised yet.

    crop: equals torchvision's `Resize(S, BICUBIC)` and `CenterCrop(S)` on a Pillow image, as in
    https://github.com/openai/CLIP/blob/main/clip/clip.py, with the format's interpolation.
    `pixel_aspect` is the width of a pixel divided by its height; the resize corrects it to 1.
    A picture of an extreme shape is first cropped, so that its resized long side fits into memory.

    squash: equals Pillow's resize to S x S, as in the image processors of Hugging Face.
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image = image if image.mode == "RGB" else image.convert("RGB")
    image_size, interpolation = format.image_size, _FILTERS[format.interpolation]
    if format.resize == "squash":
        return np.array(image.resize((image_size, image_size), interpolation))
    if max(image.size) > (most := MAX_ASPECT * min(image.size)):
        left, top = (max(0, side - most) // 2 for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    width, height = image.width * pixel_aspect, image.height
    short = min(width, height)
    size = (int(image_size * width / short), int(image_size * height / short))
    left, top = (round((side - image_size) / 2.0) for side in size)
    # The two passes of Pillow's resize, with the first crop in between to save work.
    image = image.resize((size[0], height), interpolation)
    image = image.crop((left, 0, left + image_size, height))
    image = image.resize((image_size, size[1]), interpolation)
    return np.array(image.crop((0, top, image_size, top + image_size)))


def encode_jpeg(frame_SxSx3: UInt8[np.ndarray, "S S 3"]) -> bytes:
    """Returns a JPEG of an RGB frame in [0, 255]."""
    # 4:4:4: on five test frames 18 % more bytes than 4:2:0, a mean error of 1.2 levels instead of
    # 1.6, and at worst (saturated edges) 22 levels instead of 67.
    frame = np.ascontiguousarray(frame_SxSx3)
    return simplejpeg.encode_jpeg(frame, quality=95, colorspace="RGB", colorsubsampling="444")


def decode_jpeg(
    data: bytes, out: UInt8[np.ndarray, "S S 3"] | None = None
) -> UInt8[np.ndarray, "S S 3"]:
    """Returns the RGB frame in [0, 255] of a JPEG, in the array `out` if that is given.

    Raises ValueError if the JPEG is corrupted or not of the size of `out`.
    """
    frame = simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out)
    if out is not None and frame.shape != out.shape:
        raise ValueError(f"a frame of shape {frame.shape}, expected {out.shape}")
    return frame


def _count_scans(path: PathLike) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\xff\xda") for block in iter(partial(file.read, 2**20), b""))


def read_image(path: PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the upright RGB pixels of an image file.

    Raises OSError if it is not in IMAGE_FORMATS, ValueError if it is no file, or has more than
    MAX_IMAGE_PIXELS or MAX_SCANS.
    """
    if problem := explain_no_file(path):
        raise ValueError(problem)
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            size = f"{image.width} x {image.height} pixels"
            raise ValueError(f"{size}: more than {MAX_IMAGE_PIXELS / 1e6:.0f} million")
        if image.format == "JPEG" and _count_scans(path) > MAX_SCANS:
            raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
        image.draft("RGB", (1024, 1024))  # a JPEG is decoded at a half, a quarter, an eighth
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
