"""Reads upright, square RGB frames from a video file, in a model's format: one a second, or spread.

Files are decoded sequentially from the start, and frames are chosen by presentation time: on real
files (variable rates, broken indices, wrong headers) seeking and counting frames are inexact.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import simplejpeg
from av import Packet, VideoFrame
from av.error import FFmpegError
from av.filter import Graph
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import Interpolation
from jaxtyping import UInt8
from PIL import Image, ImageOps

from xclip_jax.cli import PathLike
from xclip_jax.data.container import (
    MAX_PIXELS,
    Clock,
    Film,
    PacketReader,
    VideoError,
    exact_seconds,
    open_film,
    reason,
)
from xclip_jax.data.preprocess import ONE, FrameFormat, preprocess

# swscale follows each frame's matrix (BT.601/709/2020; BT.601 if untagged, as in ffmpeg) and range.
# Measured against the formula with 8 bits, its default is off by 1.1 levels on average, 3 at most,
# and ten times as fast as the accurate mode (0.2); with more bits it is off by up to 4.
_DEFAULT = Interpolation.BILINEAR
_ACCURATE = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_UNSPECIFIED_COLORSPACE = 2
_BT2020 = 9
HDR = (16, 18)  # transfer characteristics PQ and HLG (ITU-T H.273)
TO_SRGB = "out_transfer=iec61966-2-1:out_primaries=bt709:intent=relative_colorimetric"
_UNREAD = 0.1  # fraction of a file, or of its length, that may follow its last picture and sound
Seconds = float | None  # after the file's first frame
Stamped = tuple[int, VideoFrame]  # with the ticks since the first frame


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on reading a file."""

    pixels: int = MAX_PIXELS  # of a frame
    working_seconds: float = math.inf  # after which the rest of the file is not read


@dataclasses.dataclass
class Frames:
    """One or more frames of a video, RGB in [0, 255].

    A frame shown at several of the chosen times occurs repeatedly, as the same array. `times` are
    seconds after the file's first frame, `note` is the reason why only a part of it was read, or
    None.
    """

    frames: list[UInt8[np.ndarray, "S S 3"]]
    times: list[float]
    note: str | None = None


def read_frames(
    path: PathLike,
    format: FrameFormat,
    *,
    start: Seconds = None,
    end: Seconds = None,
    limits: Limits = Limits(),
) -> Frames:
    """Reads one frame per second: for k = 0, 1, ... the last frame shown by start + k seconds.

    If `format` spreads F frames, it is the last one shown by start + k (end - start) / F, k < F.
    Times are seconds after the file's first frame. `start` is 0 by default; start + k is at most
    `end`, by default the time of the last frame (spread: the end of it). Frames are upright and
    preprocessed to `format`, see `preprocess`. Raises VideoError if there is none.
    """
    options: dict[str, Any] = {"start": start, "end": end, "limits": limits}
    reader = VideoReader(path, **options)
    if format.spread:  # decoded twice: its header may state another length
        first = max(exact_seconds(start or 0.0), Fraction(0))
        scout = VideoReader(path, **options, times=[first])
        collections.deque(scout, maxlen=0)
        reader = VideoReader(path, **options, times=spread_times(first, scout.until, format.spread))
    pairs = [(picture.to_square(format), time) for time, picture in reader]
    return Frames([frame for frame, _ in pairs], [time for _, time in pairs], reader.note)


def spread_times(start: Fraction, end: Fraction, count: int) -> list[Fraction]:
    """Returns the starts of `count` equal parts of the time from `start` to `end`, in seconds."""
    return [start + k * (end - start) / count for k in range(count)]


class VideoReader:
    """An iterator over the pictures of `read_frames`, as (presentation time, Picture).

    There is one every `interval` seconds until the last one, or one at each of `times`, in
    ascending seconds, as if the last one was shown for ever. A picture shown at several times
    occurs repeatedly, as the same object. Iteration raises VideoError if no frame can be read.
    After the last picture, `note` is the reason why only a part of the file was read, or None,
    `count` the number of decoded frames, `end` the seconds from the file's first frame to the end
    of its last, `until` the same or the end that was asked for, if it is less, and `offset` the
    seconds from the start of the film, such as its sound, to its first frame.
    """

    note: str | None = None
    count, end, offset = 0, 0.0, 0.0
    until = Fraction(0)
    _undecoded, _discarded = 0, 0  # packets that cannot be decoded, that an edit list cuts away
    _error: Exception | None = None
    _packets: PacketReader

    def __init__(
        self,
        path: PathLike,
        *,
        start: Seconds = None,
        end: Seconds = None,
        times: Sequence[Fraction] | None = None,
        interval: Fraction = ONE,
        limits: Limits = Limits(),
    ) -> None:
        self.path, self.start, self.stop, self.limits = path, start, end, limits
        self.times, self.interval = times, interval

    def __iter__(self) -> Iterator[tuple[float, "Picture"]]:
        self.count = self._undecoded = self._discarded = 0
        self._error = None
        first = max(exact_seconds(self.start or 0.0), 0)
        last = math.inf if self.stop is None else exact_seconds(self.stop)
        with open_film(self.path, max_pixels=self.limits.pixels) as film:
            clock, second, shown, picture = film.clock(), film.second, None, None
            frames = self._decode(film, clock)
            regular = (first + k * self.interval for k in itertools.count())
            times = regular if self.times is None else self.times
            targets, holds_last = (time * second for time in times), self.times is not None
            chosen = _choose(frames, targets, last * second, holds_last=holds_last)
            for ticks, frame in chosen:
                if picture is None or frame is not shown:
                    shown, picture = frame, _to_picture(frame, film.stream.sample_aspect_ratio)
                yield float(ticks / second), picture
            if not self.count:
                raise VideoError(f"no frame could be decoded: {reason(self._error)}")
            if picture is None:
                until = "its end" if self.stop is None else f"{self.stop} s"
                raise VideoError(f"no frame between {self.start or 0} s and {until}")
            end = (clock.now + clock.period) / second
            self.end, self.until = float(end), Fraction(min(end, last))
            self.note = self._describe_missing(film)

    def _decode(self, film: Film, clock: Clock) -> Iterator[Stamped]:
        """Yields the frames in decoding order, up to an error."""
        deadline = time.monotonic() + (self.limits.working_seconds)
        try:
            self._packets = PacketReader(film, clock)
            for packet in self._packets:
                if time.monotonic() > deadline:
                    return
                self._discarded += packet.is_discard
                try:
                    frames = packet.decode()
                except (FFmpegError, ValueError) as error:
                    # A recording cut out of a broadcast starts with packets that cannot be decoded,
                    # and so may each part of joined ones.
                    frames, self._error = [], error
                    self._undecoded += self.count > 0
                    if self.count and not film.is_joinable:
                        return
                for frame in frames:
                    stamp = getattr(frame, film.stamp)
                    if not self.count:
                        self.offset = film.offset(stamp)
                    self.count, self._error = self.count + 1, None
                    yield clock(stamp), frame
        except (FFmpegError, ValueError) as error:  # of the container
            self._error = error

    def _describe_missing(self, film: Film) -> str | None:
        """Returns the reason why only a part of the file was read, or None."""
        expected = film.count_frames() - self._discarded
        if self._error:
            return f"decoder stopped at frame {self.count}: {reason(self._error)}"
        if self._undecoded:
            return f"{self._undecoded} packets of {film.container.format.name} cannot be decoded"
        if self.stop is None and self._packets.unread > _UNREAD:
            rest = f"the last {self._packets.unread:.0%} of the file"
            return f"{rest} is another recording with other tracks, not read"
        if self.stop is None and self._packets.missing > _UNREAD:
            return f"by its header, the last {self._packets.missing:.0%} of the film are missing"
        count = self.count
        if film.container.format.name == "avi" and film.stream.average_rate:
            count = round(self.end * film.stream.average_rate)  # one of 0 bytes repeats the last
        if self.stop is None and count < 0.9 * expected:
            counts = f"{count} of {expected}"
            return f"far fewer frames than the header states ({counts})"
        return None


class Picture:
    """A decoded frame, upright, with pixels of width / height `pixel_aspect`."""

    def __init__(self, image: Image.Image, pixel_aspect: Fraction) -> None:
        self.image, self.pixel_aspect = image, pixel_aspect
        self._square: dict[FrameFormat, UInt8[np.ndarray, "S S 3"]] = {}

    def to_square(self, format: FrameFormat) -> UInt8[np.ndarray, "S S 3"]:
        """Returns the preprocessed frame, which is cached by format."""
        if format not in self._square:
            self._square[format] = preprocess(self.image, format, self.pixel_aspect)
        return self._square[format]

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
    with open_film(path) as film:
        target = exact_seconds(second) * film.second
        try:
            is_stream = film.is_joinable or film.container.duration is None  # it cannot be sought
            find = _find_in_joined if is_stream else _find_by_seeking
            frame = find(film, math.floor(target))
        except (FFmpegError, ValueError, OverflowError) as error:
            raise VideoError(f"no picture at {second} s: {reason(error)}") from error
        if frame is None:
            raise VideoError(f"no picture at {second} s")
        return _to_picture(frame, film.stream.sample_aspect_ratio).encode_thumbnail(longest)


def _find_by_seeking(film: Film, target: int) -> VideoFrame | None:
    """Returns the frame shown `target` ticks after the first one, or None."""
    container: Any = film.container
    first = next(container.decode(film.stream), None)
    start = getattr(first, film.stamp, None) or 0
    for origin in (start + target, start):
        container.seek(origin, stream=film.stream)
        frame = None
        for frame_after in container.decode(film.stream):
            stamp = getattr(frame_after, film.stamp)
            if stamp is not None and stamp > start + target:
                break
            frame = frame_after
        if frame is not None and not frame.is_corrupt:
            return frame  # else it is not decodable from where seeking arrived
    return first


def _find_in_joined(film: Film, target: int) -> VideoFrame | None:
    """Returns the frame shown `target` ticks after the first one, or None, without seeking.

    Joined recordings repeat time stamps. Packets are read from the start, and those from the last
    key frame on are decoded.
    """
    clock, start, packets = film.clock(), 0, []
    for packet in PacketReader(film, clock):
        if clock(packet.dts) > target:
            break
        if packet.is_keyframe:
            start, packets = clock.now, []
        packets.append(packet)
    stamps, frame = film.clock(clock.heard), None
    stamps.now = start - stamps.period
    for decoded in _decode_packets(film, packets):
        if frame is not None and stamps(getattr(decoded, film.stamp)) > target:
            break
        frame = decoded
    return frame


def _decode_packets(film: Film, packets: list[Packet]) -> Iterator[VideoFrame]:
    for packet in [*packets, None]:  # None: what the decoder still holds
        with contextlib.suppress(FFmpegError, ValueError):
            yield from film.stream.codec_context.decode(packet)


def _choose(
    frames: Iterable[Stamped],
    targets: Iterator[Fraction],
    end: Fraction | float,
    *,
    holds_last: bool,
) -> Iterator[Stamped]:
    """Yields the last frame shown by each of the ascending targets, until `end`.

    Targets after the last frame are left out, or with `holds_last` it is shown for ever.
    """
    target, shown = next(targets, None), None
    for now, frame in frames:
        while shown and target is not None and target < now and target <= end:
            yield shown
            target = next(targets, None)
        if now > end:
            break
        shown = now, frame
    while shown and target is not None and (holds_last or target <= min(shown[0], end)):
        yield shown
        target = next(targets, None)


def _map_tones(frame: VideoFrame) -> Image.Image:
    """Converts an HDR frame to sRGB: diffuse white becomes white, brighter colours are clipped."""
    graph = Graph()
    size: Any = {"width": frame.width, "height": frame.height, "format": frame.format.name}
    source = graph.add_buffer(**size, time_base=ONE)
    scale = graph.add("scale", TO_SRGB)
    rgb, sink = graph.add("format", "rgb24"), graph.add("buffersink")
    graph.link_nodes(source, scale, rgb, sink).configure()
    source.push(frame)
    result: Any = sink.pull()
    return result.to_image()


def _to_picture(frame: VideoFrame, pixel_aspect: Fraction | None) -> Picture:
    """Converts a frame to RGB and turns it upright."""
    flags = _DEFAULT if frame.format.components[0].bits <= 8 else _ACCURATE
    options: dict[str, Any] = {"interpolation": flags, "threads": 1}

    def convert() -> Image.Image:
        return _map_tones(frame) if frame.color_trc in HDR else frame.to_image(**options)

    try:
        image = convert()
    except FFmpegError:  # a matrix that swscale does not support, such as YCgCo, ICtCp
        replace_matrix(frame)
        image = convert()
    aspect, (is_flipped, degrees) = check_aspect(pixel_aspect), find_orientation(frame)
    image = (ImageOps.flip(image) if is_flipped else image).rotate(degrees, expand=True)
    return Picture(image, aspect if degrees % 180 == 0 else 1 / aspect)


def replace_matrix(frame: VideoFrame) -> None:
    """Sets the colour matrix of a frame whose own one swscale does not support."""
    frame.colorspace = _BT2020 if frame.color_trc in HDR else _UNSPECIFIED_COLORSPACE


def check_aspect(pixel_aspect: Fraction | None) -> Fraction:
    """Returns the width / height of a stream's pixels, 1 if it is unknown or not plausible."""
    return pixel_aspect if pixel_aspect and Fraction(1, 8) <= pixel_aspect <= 8 else ONE


def find_orientation(frame: VideoFrame) -> tuple[bool, int]:
    """Returns (is_flipped, degrees): top and bottom are exchanged, then it is turned left."""
    # PyAV's rotation ignores mirroring: a negative determinant (ISO/IEC 14496-12, 6.2.2).
    # Not `frame.side_data`: it makes a reference cycle, which would keep the frame (4K: 12 MB) in
    # memory until the garbage collector runs.
    container: Any = SideDataContainer
    matrix = container(frame).get("DISPLAYMATRIX")
    if matrix is None:
        return False, 0
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    determinant = a * d - b * c
    return determinant < 0, 90 * round(frame.rotation / 90) % 360 if determinant else 0
