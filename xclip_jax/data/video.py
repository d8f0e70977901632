"""Reads one upright, square RGB frame per second from a video file, preprocessed as for CLIP.

Files are decoded sequentially from the start, and frames are chosen by presentation time: on real
files (variable rates, broken indices, wrong headers) seeking and counting frames are inexact.
"""

import contextlib
import dataclasses
import math
import os
import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import av
import av.logging
import numpy as np
import simplejpeg
from av import VideoFrame, VideoStream
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import Interpolation
from jaxtyping import UInt8
from PIL import Image, ImageOps

from xclip_jax.cli import PathLike

# swscale follows each frame's matrix (BT.601/709/2020; BT.601 if untagged, as in ffmpeg) and range.
# Measured against the formula with 8 bits, its default is off by 1.1 levels on average, 3 at most,
# and ten times as fast as the accurate mode (0.2); with more bits it is off by up to 4.
_DEFAULT = Interpolation.BILINEAR
_ACCURATE = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_UNSPECIFIED_COLORSPACE = 2
ONE = Fraction(1)
Seconds = float | None  # after the file's first frame
Stamped = tuple[int, VideoFrame]  # with the ticks since the first frame

# Steps between time stamps outside these bounds, in seconds, are a restart (joined recordings) or
# an invalid stamp, not a pause; the backward bound is ffmpeg's own.
_LARGEST_STEP_BACK, _LONGEST_PAUSE = -10, 3600


class VideoError(Exception):
    """The error that a video cannot be read, with a short reason as its message."""


@dataclasses.dataclass
class Frames:
    """One or more frames of a video, RGB in [0, 255].

    A frame shown for more than a second occurs repeatedly, as the same array. `times` are seconds
    after the file's first frame, `note` is the reason why only a part of it was read, or None.
    """

    frames: list[UInt8[np.ndarray, "S S 3"]]
    times: list[float]
    note: str | None = None


def read_frames(
    path: PathLike, image_size: int, *, start: Seconds = None, end: Seconds = None
) -> Frames:
    """Reads one frame per second: for k = 0, 1, ... the last frame shown by start + k seconds.

    Times are seconds after the file's first frame. `start` is 0 by default; start + k is at most
    `end`, by default the time of the last frame. Frames are upright, with square pixels, and
    preprocessed to S = `image_size` pixels as by `preprocess`. Raises VideoError if there is none.
    """
    reader = VideoReader(path, start=start, end=end)
    pairs = [(picture.to_square(image_size), time) for time, picture in reader]
    return Frames([frame for frame, _ in pairs], [time for _, time in pairs], reader.note)


class VideoReader:
    """An iterator over the pictures of `read_frames`, as (presentation time, Picture).

    A picture shown for more than a second occurs repeatedly, as the same object. Iteration raises
    VideoError if no frame can be read. After the last picture, `note` is the reason why only a part
    of the file was read, or None, `count` the number of decoded frames, and `end` the seconds from
    the file's first frame to the end of its last.
    """

    note: str | None = None
    count, end = 0, 0.0
    _error: Exception | None = None

    def __init__(self, path: PathLike, *, start: Seconds = None, end: Seconds = None) -> None:
        self.path, self.start, self.until = path, start, end

    def __iter__(self) -> Iterator[tuple[float, "Picture"]]:
        self.count, self._error = 0, None
        first = max(_seconds(self.start or 0.0), 0)
        last = math.inf if self.until is None else _seconds(self.until)
        with _open(self.path) as (stream, second):
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            clock, shown, picture = _Clock(second, rate), None, None
            frames = self._decode(stream, clock)
            for ticks, frame in _choose_each_second(frames, first * second, last * second, second):
                if picture is None or frame is not shown:
                    shown, picture = frame, _to_picture(frame, stream.sample_aspect_ratio)
                yield float(ticks / second), picture
            if not self.count:
                raise VideoError(f"no frame could be decoded: {_reason(self._error)}")
            if picture is None:
                until = "its end" if self.until is None else f"{self.until} s"
                raise VideoError(f"no frame between {self.start or 0} s and {until}")
            if self._error:
                self.note = f"decoder stopped at frame {self.count}: {_reason(self._error)}"
            elif self.until is None and self.count < 0.9 * stream.frames:
                counts = f"{self.count} of {stream.frames}"
                self.note = f"far fewer frames than the header states ({counts})"
            self.end = float((clock.now + clock.period) / second)

    def _decode(self, stream: VideoStream, clock: "_Clock") -> Iterator[Stamped]:
        """Yields the frames in decoding order, up to an error."""
        container: Any = stream.container
        # AVI stores decoding times only; with B-frames, the presentation times that FFmpeg derives
        # from them are out of order.
        stamp = "dts" if container.format.name == "avi" else "pts"
        try:
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except (FFmpegError, ValueError) as error:
                    # A recording cut out of a broadcast starts with packets that cannot be decoded.
                    frames, self._error = [], error
                    if self.count:
                        return
                for frame in frames:
                    self.count, self._error = self.count + 1, None
                    yield clock(getattr(frame, stamp)), frame
        except (FFmpegError, ValueError) as error:  # of the container
            self._error = error


class Picture:
    """A decoded frame, upright, with pixels of width / height `pixel_aspect`."""

    def __init__(self, image: Image.Image, pixel_aspect: Fraction) -> None:
        self.image, self.pixel_aspect = image, pixel_aspect
        self._square: dict[int, UInt8[np.ndarray, "S S 3"]] = {}

    def to_square(self, image_size: int) -> UInt8[np.ndarray, "S S 3"]:
        """Returns the preprocessed frame, which is cached by image size."""
        if image_size not in self._square:
            self._square[image_size] = preprocess(self.image, image_size, self.pixel_aspect)
        return self._square[image_size]

    def encode_thumbnail(self, longest: int) -> bytes:
        """Returns a JPEG of the uncropped picture, at most `longest` pixels long."""
        width, height = self.image.width * self.pixel_aspect, self.image.height
        scale = min(1, longest / max(width, height))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = self.image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
        return simplejpeg.encode_jpeg(np.array(small), quality=80, colorspace="RGB")


def read_still(path: PathLike, second: float, longest: int = 320) -> bytes:
    """Returns a JPEG of the picture shown `second` seconds after the first frame.

    It seeks, which is inexact on files with invalid time stamps or indices: for display only.
    """
    with _open(path) as (stream, ticks_per_second):
        container: Any = stream.container
        start, frame = stream.start_time or 0, None
        try:
            target = start + round(_seconds(second) * ticks_per_second)
            for origin in (target, start):
                frame = None
                container.seek(origin, stream=stream)
                for frame in container.decode(stream):
                    if frame.pts is None or frame.pts + (frame.duration or 1) > target:
                        break
                if frame is not None and not frame.is_corrupt:
                    break  # else it is not decodable from where seeking arrived
        except (FFmpegError, ValueError, OverflowError) as error:
            raise VideoError(f"no picture at {second} s: {_reason(error)}") from error
        if frame is None:
            raise VideoError(f"no picture at {second} s")
        return _to_picture(frame, stream.sample_aspect_ratio).encode_thumbnail(longest)


def preprocess(
    image: Image.Image | UInt8[np.ndarray, "H W 3"], image_size: int, pixel_aspect: Fraction = ONE
) -> UInt8[np.ndarray, "S S 3"]:
    """Applies CLIP's preprocessing before normalisation: short side to S, bicubic, centre crop.

    Equals torchvision's `Resize(S, BICUBIC)` and `CenterCrop(S)` on a Pillow image, as in
    https://github.com/openai/CLIP/blob/main/clip/clip.py, for RGB in [0, 255] and S = `image_size`.
    `pixel_aspect` is the width of a pixel divided by its height; the resize corrects it to 1.
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image = image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.width * pixel_aspect, image.height
    short = min(width, height)
    size = (int(image_size * width / short), int(image_size * height / short))
    left, top = (round((side - image_size) / 2.0) for side in size)
    # The two passes of Pillow's resize, with the first crop in between to save work.
    image = image.resize((size[0], height), Image.Resampling.BICUBIC)
    image = image.crop((left, 0, left + image_size, height))
    image = image.resize((image_size, size[1]), Image.Resampling.BICUBIC)
    return np.array(image.crop((0, top, image_size, top + image_size)))


def encode_jpeg(frame_SxSx3: UInt8[np.ndarray, "S S 3"]) -> bytes:
    """Returns a JPEG of an RGB frame in [0, 255]."""
    # 4:4:4: on five test frames 18 % more bytes than 4:2:0, a mean error of 1.2 levels instead of
    # 1.6, and at worst (saturated edges) 22 levels instead of 67.
    frame = np.ascontiguousarray(frame_SxSx3)
    return simplejpeg.encode_jpeg(frame, quality=95, colorspace="RGB", colorsubsampling="444")


def decode_jpeg(data: bytes) -> UInt8[np.ndarray, "S S 3"]:
    """Returns the RGB frame in [0, 255] of a JPEG, or raises ValueError."""
    return simplejpeg.decode_jpeg(data, colorspace="RGB")


@contextlib.contextmanager
def _open(path: PathLike) -> Iterator[tuple[VideoStream, Fraction]]:
    """Opens a file and yields (video stream, its ticks per second)."""
    av.logging.set_level(None)  # FFmpeg would print every corrupted macroblock to stderr
    try:
        if os.path.getsize(path) == 0:
            raise VideoError("empty file (0 bytes)")
        # Absolute: a colon in a relative name looks like a protocol. Tags may be of any encoding.
        container = av.open(os.path.abspath(path), metadata_errors="replace")
    except (OSError, ValueError, FFmpegError) as error:
        raise VideoError(f"cannot be opened: {_reason(error)}") from error
    with container:
        stream = _video_stream(container)
        stream.codec_context.thread_count = 1  # callers run one process per core
        yield stream, 1 / (stream.time_base or Fraction(1, 1_000_000))


def _video_stream(container: InputContainer) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise VideoError("no video stream")
    streams = [s for s in streams if s.codec_context is not None]
    if not streams:
        raise VideoError("no decoder for the video stream")
    return next((s for s in streams if s.disposition & Disposition.default), streams[0])


class _Clock:
    """A converter of time stamps, possibly invalid, to non-decreasing ticks since the first frame.

    A second has `second` ticks and `rate` frames. Ticks are integers: in floating point, 17.8 s -
    16.8 s is not 1 s.
    """

    def __init__(self, second: Fraction, rate: Fraction) -> None:
        self.period = max(round(second / rate), 1)
        self.steps = round(_LARGEST_STEP_BACK * second), round(_LONGEST_PAUSE * second)
        self.zero: int | None = None
        self.now = -self.period

    def __call__(self, stamp: int | None) -> int:
        if stamp is None:
            self.now += self.period
            return self.now
        back, pause = self.steps
        if self.zero is None or not back <= stamp - self.zero - self.now <= pause:
            self.zero = stamp - self.now - self.period
        self.now = max(self.now, stamp - self.zero)
        return self.now


def _choose_each_second(
    frames: Iterable[Stamped], start: Fraction, end: Fraction | float, second: Fraction
) -> Iterator[Stamped]:
    """Yields the last frame shown by start, start + second, ... until `end` or the last frame."""
    target, shown = start, None
    for now, frame in frames:
        while shown and target < now and target <= end:
            yield shown
            target += second
        if now > end:
            return
        shown = now, frame
    while shown and target <= min(shown[0], end):
        yield shown
        target += second


def _to_picture(frame: VideoFrame, pixel_aspect: Fraction | None) -> Picture:
    """Converts a frame to RGB and turns it upright."""
    flags = _DEFAULT if frame.format.components[0].bits <= 8 else _ACCURATE
    options: dict[str, Any] = {"interpolation": flags, "threads": 1}
    try:
        image = frame.to_image(**options)
    except FFmpegError:  # a matrix that swscale does not support, such as YCgCo
        frame.colorspace = _UNSPECIFIED_COLORSPACE
        image = frame.to_image(**options)
    # Values beyond these bounds are invalid header data.
    aspect = pixel_aspect if pixel_aspect and Fraction(1, 8) <= pixel_aspect <= 8 else ONE
    # PyAV's rotation ignores mirroring: a negative determinant (ISO/IEC 14496-12, 6.2.2).
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
        determinant = a * d - b * c
        degrees = 90 * round(frame.rotation / 90) if determinant else 0  # counterclockwise
        image = (ImageOps.flip(image) if determinant < 0 else image).rotate(degrees, expand=True)
        aspect = aspect if degrees % 180 == 0 else 1 / aspect
    return Picture(image, aspect)


def _seconds(value: float) -> Fraction:
    # 0.3 is slightly less than 3/10 in floating point, and would miss the frame at 3/10 s.
    return Fraction(value).limit_denominator(1_000_000)


def _reason(error: Exception | None) -> str:
    return getattr(error, "strerror", None) or str(error or "the file has none")
