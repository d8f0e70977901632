"""Video file -> one upright, square RGB frame a second, as CLIP takes its images.

The file is decoded from its start, frame after frame, and frames are chosen by presentation time:
seeking and counting are both off on real files (variable rates, broken indices, wrong headers).
"""

import dataclasses
import math
import os
import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
import simplejpeg
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".divx", ".mpg", ".mpeg", ".m2v"),
    *(".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv"),
    *(".3gpp", ".rm", ".rmvb", ".mxf"),
    *(".ogg", ".gif"),
)

# swscale heeds each frame's matrix (BT.601/709/2020; untagged is BT.601, as in ffmpeg) and range.
# Measured against the formula, its default is off by 1.1 levels in the mean, 3 at most, with 8
# bits, and ten times as fast as the accurate way (0.2); with more bits it is off by up to 4.
_DEFAULT = Interpolation.BILINEAR
_ACCURATE = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_UNSPECIFIED_COLORSPACE = 2

# (axes swapped, then x flipped, then y flipped) -> the one Pillow operation that does it.
_TURNS = {
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}

# Steps of the clock outside these bounds, in seconds, are a restart (joined recordings) or a broken
# stamp, not a pause; the backward bound is ffmpeg's own.
_FURTHEST_BACK, _LONGEST_PAUSE = -10, 3600


class VideoError(Exception):
    """A video that cannot be read; the message is the reason, in a few words."""


@dataclasses.dataclass
class Frames:
    """What a video gave: n frames, n >= 1.

    frames: n uint8 arrays S x S x 3, RGB in [0, 255]; a frame shown for more than a second is in
        the list more than once (the same array).
    times: n presentation times of these frames, in seconds after the file's first frame.
    note: None, or why the file was read only in part.
    """

    frames: list[np.ndarray]
    times: list[float]
    note: str | None = None


def read_frames(
    path: str | os.PathLike, image_size: int, start: float | None = None, end: float | None = None
) -> Frames:
    """Reads one frame a second: for k = 0, 1, ... the last frame shown no later than start + k.

    Args:
      path: the video file; its first stream of moving pictures is read.
      image_size: S, pixels.
      start: seconds after the file's first frame; None is 0.
      end: likewise, the last k at most; None is the time of the last frame.

    Returns:
      Frames, turned upright, pixels made square, preprocessed as `preprocess` does.

    Raises:
      VideoError: not one frame could be had.
    """
    reader = VideoReader(path, start, end)
    chosen = [(picture.square(image_size), time) for time, picture in reader]
    return Frames(*map(list, zip(*chosen, strict=True)), reader.note)


class VideoReader:
    """The pictures of `read_frames` one after another, as (presentation time, Picture); once.

    A picture shown for more than a second comes more than once, the same object.

    Attributes, after the last picture:
      note: None, or why the file was read only in part.
      end: seconds from the file's first frame to the end of its last.

    Raises, on iteration:
      VideoError: not one frame could be had.
    """

    def __init__(
        self, path: str | os.PathLike, start: float | None = None, end: float | None = None
    ):
        self.path, self.start, self.until = path, start, end
        self.note: str | None = None
        self.end = 0.0

    def __iter__(self) -> Iterator[tuple[float, "Picture"]]:
        av.logging.set_level(None)  # FFmpeg would print each broken macroblock to stderr
        first = max(_seconds(self.start or 0), 0)
        last = math.inf if self.until is None else _seconds(self.until)
        with _open(self.path) as container:
            stream = _video_stream(container)
            decoder = _Decoder(container, stream)
            upright = _Upright(stream.sample_aspect_ratio)
            second, found = 1 / stream.time_base, False
            for ticks, frame in _pick(decoder, first * second, last * second, second):
                found = True
                yield float(ticks / second), upright(frame)
            if not decoder.count:
                raise VideoError(f"no frame could be decoded: {_reason(decoder.error)}")
            if not found:
                until = "its end" if self.until is None else f"{self.until} s"
                raise VideoError(f"no frame between {self.start or 0} s and {until}")
            self.note = decoder.trouble(stream.frames if self.until is None else 0)
            self.end = float(decoder.end / second)


class Picture:
    """A decoded frame, upright; its pixels may not be square yet.

    Attributes:
      image: RGB.
      pixel_aspect: width of a pixel over its height.
    """

    def __init__(self, image: Image.Image, pixel_aspect: Fraction):
        self.image, self.pixel_aspect = image, pixel_aspect
        self._square: dict[int, np.ndarray] = {}

    def square(self, image_size: int) -> np.ndarray:
        """uint8 S x S x 3 as `preprocess` makes it; asked for again, the same array."""
        if image_size not in self._square:
            self._square[image_size] = preprocess(self.image, image_size, self.pixel_aspect)
        return self._square[image_size]

    def thumbnail(self, longest: int) -> bytes:
        """JPEG of the whole picture, its longer side `longest` pixels, or its own if shorter."""
        width, height = self.image.width * self.pixel_aspect, self.image.height
        scale = min(1, longest / max(width, height))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = self.image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
        return simplejpeg.encode_jpeg(np.array(small), quality=80, colorspace="RGB")


def still(path: str | os.PathLike, second: float, longest: int = 320) -> bytes:
    """JPEG of the picture shown `second` seconds after the file's first frame, found by seeking.

    Fast, and on files with odd time stamps or indices not exact: for people to look at.

    Raises:
      VideoError: there is no such picture.
    """
    av.logging.set_level(None)
    with _open(path) as container:
        stream = _video_stream(container)
        try:
            wanted = (stream.start_time or 0) + round(_seconds(second) / stream.time_base)
            frame = _seek(container, stream, wanted, wanted)
            if frame is None or frame.is_corrupt:  # where it landed cannot be decoded by itself
                frame = _seek(container, stream, stream.start_time or 0, wanted)
        except (av.FFmpegError, ValueError, OverflowError) as error:
            raise VideoError(f"no picture at {second} s: {_reason(error)}") from error
        if frame is None:
            raise VideoError(f"no picture at {second} s")
        return _Upright(stream.sample_aspect_ratio)(frame).thumbnail(longest)


def _seek(container, stream, start: int, wanted: int) -> av.VideoFrame | None:
    """Of the frames from about `start` on, in ticks, the one shown at `wanted`, or the last."""
    frame = None
    container.seek(start, stream=stream)
    for frame in container.decode(stream):
        if frame.pts is None or frame.pts + (frame.duration or 1) > wanted:
            break
    return frame


def preprocess(
    image: Image.Image | np.ndarray, image_size: int, pixel_aspect: Fraction | float = 1
) -> np.ndarray:
    """CLIP's image preprocessing up to the normalisation: short side to S, bicubic, centre crop.

    Equals torchvision's `Resize(S, BICUBIC)` and `CenterCrop(S)` on a Pillow image, as in
    https://github.com/openai/CLIP/blob/main/clip/clip.py.

    Args:
      image: a Pillow image, or uint8 H x W x 3, RGB in [0, 255].
      image_size: S, pixels.
      pixel_aspect: width of a pixel over its height; made 1 in the same resize, so that the
        picture is resampled once.

    Returns:
      uint8 S x S x 3, RGB in [0, 255].
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image = image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.width * pixel_aspect, image.height
    short = min(width, height)
    size = (int(image_size * width / short), int(image_size * height / short))
    left, top = (round((side - image_size) / 2.0) for side in size)
    # The two passes of Pillow's resize, one at a time: the second need not see what is cut off.
    image = image.resize((size[0], height), Image.Resampling.BICUBIC)
    image = image.crop((left, 0, left + image_size, height))
    image = image.resize((image_size, size[1]), Image.Resampling.BICUBIC)
    return np.array(image.crop((0, top, image_size, top + image_size)))


def encode_jpeg(frame_SxSx3: np.ndarray) -> bytes:
    """uint8 S x S x 3, RGB in [0, 255] -> JPEG."""
    # Full colour resolution: on five test frames 18 % more bytes than 4:2:0, a mean error of 1.2
    # levels instead of 1.6, and at worst (saturated edges) 22 levels instead of 67.
    frame_SxSx3 = np.ascontiguousarray(frame_SxSx3)
    return simplejpeg.encode_jpeg(frame_SxSx3, quality=95, colorspace="RGB", colorsubsampling="444")


def decode_jpeg(data: bytes) -> np.ndarray:
    """JPEG -> uint8 S x S x 3, RGB in [0, 255]; ValueError if it is none."""
    return simplejpeg.decode_jpeg(data, colorspace="RGB")


def _open(path: str | os.PathLike) -> av.container.InputContainer:
    try:
        if os.path.getsize(path) == 0:
            raise VideoError("empty file (0 bytes)")
        # Absolute, or a colon in the name reads as a protocol; and tags may be of any encoding.
        return av.open(os.path.abspath(path), metadata_errors="replace")
    except (OSError, ValueError, av.FFmpegError) as error:
        raise VideoError(f"cannot be opened: {_reason(error)}") from error


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise VideoError("no video stream")
    streams = [s for s in streams if s.codec_context is not None]
    if not streams:
        raise VideoError("no decoder for the video stream")
    stream = next((s for s in streams if s.disposition & Disposition.default), streams[0])
    stream.codec_context.thread_count = 1  # the caller runs one process a core
    return stream


class _Decoder:
    """Iterates over (ticks, frame) in decoding order, until the file's end or the first error.

    Ticks are of the stream's time base, and counted from the first frame.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream):
        self.container, self.stream = container, stream
        self.clock = _Clock(stream)
        self.count = 0
        self.error: Exception | None = None

    @property
    def end(self) -> int:
        return self.clock.end

    def __iter__(self) -> Iterator[tuple[int, av.VideoFrame]]:
        # AVI keeps decoding times alone; what FFmpeg makes of them as presentation times jumps
        # back and forth with B-frames.
        stamp = "dts" if self.container.format.name == "avi" else "pts"
        try:
            for packet in self.container.demux(self.stream):
                for frame in self._decode(packet):
                    self.count += 1
                    yield self.clock(getattr(frame, stamp)), frame
        except (av.FFmpegError, ValueError) as error:
            self.error = error

    def _decode(self, packet: av.Packet) -> list[av.VideoFrame]:
        try:
            frames = packet.decode()
        except (av.FFmpegError, ValueError) as error:
            if self.count:
                raise
            # A recording cut out of a broadcast starts with packets nobody can decode.
            self.error, frames = error, []
        if frames:
            self.error = None
        return frames

    def trouble(self, expected: int) -> str | None:
        """Why fewer frames came than should; `expected` as the header says, 0 if it does not."""
        if self.error:
            return f"decoder stopped at frame {self.count}: {_reason(self.error)}"
        if self.count < 0.9 * expected:
            return f"far fewer frames than the header says ({self.count} of {expected})"
        return None


class _Clock:
    """Time stamps, with whatever is wrong with them -> ticks since the first frame, never back.

    Ticks are integers: 17.8 s - 16.8 s is not 1 s in floating point.
    """

    def __init__(self, stream: av.VideoStream):
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        self.period = max(round(1 / (rate * stream.time_base)), 1)
        self.furthest_back = round(_FURTHEST_BACK / stream.time_base)
        self.longest_pause = round(_LONGEST_PAUSE / stream.time_base)
        self.zero: int | None = None
        self.now = -self.period

    @property
    def end(self) -> int:
        """Ticks from the first frame to the end of the last, had it an average length."""
        return self.now + self.period

    def __call__(self, stamp: int | None) -> int:
        due = self.end
        if stamp is None:
            self.now = due
            return due
        step = 0 if self.zero is None else stamp - self.zero - self.now
        if self.zero is None or not self.furthest_back <= step <= self.longest_pause:
            self.zero = stamp - due
        self.now = max(self.now, stamp - self.zero)
        return self.now


def _pick(
    stamped_frames: Iterable[tuple[int, av.VideoFrame]],
    start: Fraction,
    end: Fraction | float,
    second: Fraction,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """For start, start + second, ... up to `end` and the last frame: the last one by then."""
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


class _Upright:
    """Decoded frame -> Picture; asked for the same frame again, the same Picture."""

    def __init__(self, pixel_aspect: Fraction | None):
        # Beyond these bounds it is a header's garbage.
        sane = pixel_aspect is not None and Fraction(1, 8) <= pixel_aspect <= 8
        self.pixel_aspect = pixel_aspect if sane else Fraction(1)
        self.reformatter = VideoReformatter()
        self.frame, self.picture = None, None

    def __call__(self, frame: av.VideoFrame) -> Picture:
        if frame is not self.frame:
            image, aspect = Image.fromarray(self._rgb(frame).to_ndarray()), self.pixel_aspect
            swapped, turn = _turn(frame)
            if turn is not None:
                image = image.transpose(turn)
            self.frame = frame
            self.picture = Picture(image, 1 / aspect if swapped else aspect)
        return self.picture

    def _rgb(self, frame: av.VideoFrame) -> av.VideoFrame:
        flags = _DEFAULT if frame.format.components[0].bits <= 8 else _ACCURATE
        how = {"format": "rgb24", "interpolation": flags, "threads": 1}
        try:
            return self.reformatter.reformat(frame, **how)
        except av.FFmpegError:  # a matrix swscale does not know, such as YCgCo
            frame.colorspace = _UNSPECIFIED_COLORSPACE
            return self.reformatter.reformat(frame, **how)


def _turn(frame: av.VideoFrame) -> tuple[bool, Image.Transpose | None]:
    """Whether width and height change places, and what sets the frame upright.

    By its display matrix, ISO/IEC 14496-12, 6.2.2; mirroring included, angles to the next 90.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, None
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])  # x' = a x + c y, y' = b x + d y
    swapped = abs(b) > abs(a)
    x, y = (c, b) if swapped else (a, d)
    return swapped, _TURNS.get((swapped, x < 0, y < 0))


def _seconds(value: float) -> Fraction:
    # 0.3 is a little less than 3/10 in floating point, and would miss the frame at 3/10 s.
    return Fraction(value).limit_denominator(1_000_000)


def _reason(error: Exception | None) -> str:
    return getattr(error, "strerror", None) or str(error or "the file holds none")
