"""Small video files: frame n is grey with a brightness of 20 + 4 n, unless pictures are given."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image

MS = Fraction(1, 1000)


def grey(number):
    """Returns the picture of frame `number` < 50, with 4 levels per frame."""
    return np.full((64, 96, 3), 20 + 4 * number, np.uint8)


def corners(height=96, width=160):
    """Returns a picture: red top left, green top right, blue bottom left, white bottom right."""
    picture = np.zeros((height, width, 3), np.uint8)
    top, left = slice(0, height // 2), slice(0, width // 2)
    picture[top, left, 0] = picture[top, width // 2 :, 1] = picture[height // 2 :, left, 2] = 255
    picture[height // 2 :, width // 2 :] = 255
    return picture


def write(path, times, pictures=None, codec="libx264", time_base=MS, setup=None, **options):
    """Writes a video with one picture (numbered grey by default) at each of `times` in seconds."""
    pictures = pictures or [grey(number) for number in range(len(times))]
    options = {"crf": "4", "preset": "ultrafast"} | options if codec == "libx264" else options
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", time_base
        if setup:
            setup(stream)
        for time, picture in zip(times, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames):
    """Returns the numbers of grey frames."""
    return [round((float(frame.mean()) - 20) / 4) for frame in frames.frames]


def at_rate(rate, count):
    return [Fraction(number) / rate for number in range(count)]


def plain_preprocess(image, size):
    """Returns the result of CLIP's transform: Resize(size, BICUBIC), CenterCrop(size)."""
    width, height = image.size
    if width <= height:
        image = image.resize((size, int(size * height / width)), Image.BICUBIC)
    else:
        image = image.resize((int(size * width / height), size), Image.BICUBIC)
    top = int(round((image.height - size) / 2.0))  # noqa: RUF046, as torchvision writes it
    left = int(round((image.width - size) / 2.0))  # noqa: RUF046
    return np.asarray(image)[top : top + size, left : left + size]
