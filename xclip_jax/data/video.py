"""Reads one upright, square RGB frame per second from a video file, preprocessed as for CLIP.

Files are decoded sequentially from the start, and frames are chosen by presentation time: on real
files (variable rates, broken indices, wrong headers) seeking and counting frames are inexact.
"""

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
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image, ImageOps

# swscale follows each frame's matrix (BT.601/709/2020; BT.601 if untagged, as in ffmpeg) and range.
# Measured against the formula with 8 bits, its default is off by 1.1 levels on average, 3 at most,
# and ten times as fast as the accurate mode (0.2); with more bits it is off by up to 4.
_DEFAULT = Interpolation.BILINEAR
_ACCURATE = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_UNSPECIFIED_COLORSPACE = 2

# Steps between time stamps outside these bounds, in seconds, are a restart (joined recordings) or
# an invalid stamp, not a pause; the backward bound is ffmpeg's own.
_LARGEST_STEP_BACK, _LONGEST_PAUSE = -10, 3600


class VideoError(Exception):
    """The error that a video cannot be read, with a short reason as its message."""


@dataclasses.dataclass
class Frames:
    """One or more frames of a video.

    Attributes:
      frames: RGB in [0, 255]; a frame shown for more than a second occurs repeatedly (the same
        array).
      times: presentation times of these frames in seconds after the file's first frame.
      note: None, or the reason why only a part of the file was read.
    """

    frames: list[UInt8[np.ndarray, "S S 3"]]
    times: list[float]
    note: str | None = None


def read_frames(
    path: str | os.PathLike,
    image_size: int,
    *,
    start: float | None = None,
    end: float | None = None,
) -> Frames:
    """Reads one frame per second: for k = 0, 1, ... the last frame shown by start + k seconds.

    Args:
      path: the video file, whose first video stream other than a cover image is read.
      image_size: S, pixels.
      start: seconds after the file's first frame; None is 0.
      end: upper bound of start + k in the same seconds; None is the time of the last frame.

    Returns:
      Frames, rotated upright, with square pixels, preprocessed as by `preprocess`.

    Raises:
      VideoError: no frame could be read.
    """
    reader = VideoReader(path, start=start, end=end)
    pairs = [(picture.to_square(image_size), time) for time, picture in reader]
    return Frames([frame for frame, _ in pairs], [time for _, time in pairs], reader.note)


class VideoReader:
    """An iterator over the pictures of `read_frames`, as (presentation time, Picture).

    A picture shown for more than a second occurs repeatedly, as the same object. Iteration raises
    VideoError if no frame can be read.

    Attributes, valid after the last picture:
      note: None, or the reason why only a part of the file was read.
      end: seconds from the file's first frame to the end of its last.
    """

    def __init__(
        self, path: str | os.PathLike, *, start: float | None = None, end: float | None = None
    ) -> None:
        self.path, self.start, self.until = path, start, end
        self.note: str | None = None
        self.end = 0.0

    def __iter__(self) -> Iterator[tuple[float, "Picture"]]:
        av.logging.set_level(None)  # FFmpeg would print every corrupted macroblock to stderr
        first = max(_seconds(self.start or 0.0), 0)
        last = math.inf if self.until is None else _seconds(self.until)
        with _open(self.path) as container:
            stream = _video_stream(container)
            decoder = _Decoder(container, stream)
            upright = _Converter(stream.sample_aspect_ratio)
            second, empty = _ticks_per_second(stream), True
            for ticks, frame in _choose_each_second(decoder, first * second, last * second, second):
                empty = False
                yield float(ticks / second), upright(frame)
            if not decoder.count:
                raise VideoError(f"no frame could be decoded: {_reason(decoder.error)}")
            if empty:
                until = "its end" if self.until is None else f"{self.until} s"
                raise VideoError(f"no frame between {self.start or 0} s and {until}")
            self.note = decoder.describe_missing_frames(stream.frames if self.until is None else 0)
            self.end = float(decoder.clock.end / second)


class Picture:
    """A decoded frame, upright, with pixels of width / height `pixel_aspect`."""

    def __init__(self, image: Image.Image, pixel_aspect: Fraction) -> None:
        self.image, self.pixel_aspect = image, pixel_aspect
        self._square: dict[int, UInt8[np.ndarray, "S S 3"]] = {}

    def to_square(self, image_size: int) -> UInt8[np.ndarray, "S S 3"]:
        """Returns the frame as `preprocess` makes it, cached by size."""
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


def read_still(path: str | os.PathLike, second: float, longest: int = 320) -> bytes:
    """Returns a JPEG of the picture shown `second` seconds after the first frame, by seeking.

    Fast, but inexact on files with invalid time stamps or indices: for display only.

    Raises:
      VideoError: there is no such picture.
    """
    av.logging.set_level(None)
    with _open(path) as container:
        stream = _video_stream(container)
        start = stream.start_time or 0
        try:
            target = start + round(_seconds(second) * _ticks_per_second(stream))
            frame = _seek(container, stream, target, target)
            if frame is None or frame.is_corrupt:  # not decodable from where seeking arrived
                frame = _seek(container, stream, start, target)
        except (FFmpegError, ValueError, OverflowError) as error:
            raise VideoError(f"no picture at {second} s: {_reason(error)}") from error
        if frame is None:
            raise VideoError(f"no picture at {second} s")
        return _Converter(stream.sample_aspect_ratio)(frame).encode_thumbnail(longest)


def _seek(
    container: InputContainer, stream: VideoStream, start: int, target: int
) -> VideoFrame | None:
    """Returns the frame shown at `target`, or the last, decoding from about `start` (in ticks)."""
    frame = None
    container.seek(start, stream=stream)
    for frame in container.decode(stream):
        if frame.pts is None or frame.pts + (frame.duration or 1) > target:
            break
    return frame


def preprocess(
    image: Image.Image | UInt8[np.ndarray, "H W 3"],
    image_size: int,
    pixel_aspect: Fraction | float = 1,
) -> UInt8[np.ndarray, "S S 3"]:
    """Applies CLIP's preprocessing before normalisation: short side to S, bicubic, centre crop.

    Equals torchvision's `Resize(S, BICUBIC)` and `CenterCrop(S)` on a Pillow image, as in
    https://github.com/openai/CLIP/blob/main/clip/clip.py.

    Args:
      image: a Pillow image or RGB in [0, 255].
      image_size: S, pixels.
      pixel_aspect: width of a pixel divided by its height; the resize corrects it to 1.

    Returns:
      RGB in [0, 255].
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
    frame_SxSx3 = np.ascontiguousarray(frame_SxSx3)
    return simplejpeg.encode_jpeg(frame_SxSx3, quality=95, colorspace="RGB", colorsubsampling="444")


def decode_jpeg(data: bytes) -> UInt8[np.ndarray, "S S 3"]:
    """Returns the RGB frame in [0, 255] of a JPEG, or raises ValueError."""
    return simplejpeg.decode_jpeg(data, colorspace="RGB")


def _open(path: str | os.PathLike) -> InputContainer:
    try:
        if os.path.getsize(path) == 0:
            raise VideoError("empty file (0 bytes)")
        # Absolute: a colon in a relative name looks like a protocol. Tags may be of any encoding.
        return av.open(os.path.abspath(path), metadata_errors="replace")
    except (OSError, ValueError, FFmpegError) as error:
        raise VideoError(f"cannot be opened: {_reason(error)}") from error


def _video_stream(container: InputContainer) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise VideoError("no video stream")
    streams = [s for s in streams if s.codec_context is not None]
    if not streams:
        raise VideoError("no decoder for the video stream")
    stream = next((s for s in streams if s.disposition & Disposition.default), streams[0])
    stream.codec_context.thread_count = 1  # callers run one process per core
    return stream


def _ticks_per_second(stream: VideoStream) -> Fraction:
    return 1 / (stream.time_base or Fraction(1, 1_000_000))


class _Decoder:
    """An iterator over (ticks, frame) in decoding order, up to the first error.

    Ticks are units of the stream's time base, counted from the first frame.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.container, self.stream = container, stream
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        self.clock = _Clock(_ticks_per_second(stream), rate)
        self.count = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[int, VideoFrame]]:
        # AVI stores decoding times only; with B-frames, the presentation times that FFmpeg derives
        # from them are out of order.
        stamp = "dts" if self.container.format.name == "avi" else "pts"
        try:
            for packet in self.container.demux(self.stream):
                for frame in self._decode(packet):
                    self.count += 1
                    yield self.clock(getattr(frame, stamp)), frame
        except (FFmpegError, ValueError) as error:
            self.error = error

    def _decode(self, packet: Packet) -> list[VideoFrame]:
        try:
            frames = packet.decode()
        except (FFmpegError, ValueError) as error:
            if self.count:
                raise
            # A recording cut out of a broadcast starts with packets that cannot be decoded.
            self.error, frames = error, []
        if frames:
            self.error = None
        return frames

    def describe_missing_frames(self, expected: int) -> str | None:
        """Returns why frames are missing, or None, given the expected number (0: unknown)."""
        if self.error:
            return f"decoder stopped at frame {self.count}: {_reason(self.error)}"
        if self.count < 0.9 * expected:
            return f"far fewer frames than the header states ({self.count} of {expected})"
        return None


class _Clock:
    """A converter of time stamps, possibly invalid, to non-decreasing ticks since the first frame.

    Ticks are integers, as 17.8 s - 16.8 s is not 1 s in floating point.
    """

    def __init__(self, second: Fraction, rate: Fraction) -> None:
        """Starts a clock with `second` ticks and `rate` frames per second."""
        self.period = max(round(second / rate), 1)
        self.steps = round(_LARGEST_STEP_BACK * second), round(_LONGEST_PAUSE * second)
        self.zero: int | None = None
        self.now = -self.period

    @property
    def end(self) -> int:
        """Ticks from the first frame to the end of the last, assuming an average duration."""
        return self.now + self.period

    def __call__(self, stamp: int | None) -> int:
        expected = self.end
        if stamp is None:
            self.now = expected
            return expected
        step = 0 if self.zero is None else stamp - self.zero - self.now
        if self.zero is None or not self.steps[0] <= step <= self.steps[1]:
            self.zero = stamp - expected
        self.now = max(self.now, stamp - self.zero)
        return self.now


def _choose_each_second(
    stamped_frames: Iterable[tuple[int, VideoFrame]],
    start: Fraction,
    end: Fraction | float,
    second: Fraction,
) -> Iterator[tuple[int, VideoFrame]]:
    """Yields the last frame shown by start, start + second, ... until `end` or the last frame."""
    target, shown = start, None
    for now, frame in stamped_frames:
        while shown and target < now and target <= end:
            yield shown
            target += second
        if now > end:
            return
        shown = now, frame
    while shown and target <= min(shown[0], end):
        yield shown
        target += second


class _Converter:
    """A converter of decoded frames to Pictures that reuses the Picture of a repeated frame."""

    def __init__(self, pixel_aspect: Fraction | None) -> None:
        # Values beyond these bounds are invalid header data.
        valid = pixel_aspect is not None and Fraction(1, 8) <= pixel_aspect <= 8
        self.pixel_aspect = pixel_aspect if valid and pixel_aspect else Fraction(1)
        self.reformatter = VideoReformatter()
        self.last: tuple[VideoFrame, Picture] | None = None

    def __call__(self, frame: VideoFrame) -> Picture:
        if self.last is None or self.last[0] is not frame:
            image = Image.fromarray(self._to_rgb(frame).to_ndarray())
            mirrored, degrees = _display_transform(frame)
            image = (ImageOps.flip(image) if mirrored else image).rotate(degrees, expand=True)
            aspect = self.pixel_aspect if degrees % 180 == 0 else 1 / self.pixel_aspect
            self.last = frame, Picture(image, aspect)
        return self.last[1]

    def _to_rgb(self, frame: VideoFrame) -> VideoFrame:
        flags = _DEFAULT if frame.format.components[0].bits <= 8 else _ACCURATE
        options: dict[str, Any] = {"format": "rgb24", "interpolation": flags, "threads": 1}
        try:
            return self.reformatter.reformat(frame, **options)
        except FFmpegError:  # a matrix that swscale does not support, such as YCgCo
            frame.colorspace = _UNSPECIFIED_COLORSPACE
            return self.reformatter.reformat(frame, **options)


def _display_transform(frame: VideoFrame) -> tuple[bool, int]:
    """Returns (True to flip upside down, degrees to then rotate counterclockwise by).

    PyAV's rotation ignores mirroring, which is a negative determinant of the display matrix
    (ISO/IEC 14496-12, 6.2.2).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 0
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    determinant = a * d - b * c
    return determinant < 0, 90 * round(frame.rotation / 90) if determinant else 0


def _seconds(value: float) -> Fraction:
    # 0.3 is slightly less than 3/10 in floating point, and would miss the frame at 3/10 s.
    return Fraction(value).limit_denominator(1_000_000)


def _reason(error: Exception | None) -> str:
    return getattr(error, "strerror", None) or str(error or "the file has none")
