"""Opens video files and turns their time stamps into seconds of one continuous film."""

import bisect
import contextlib
import io
import itertools
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import av.logging
from av import Packet, VideoFrame, VideoStream
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.format import Flags
from av.stream import Disposition

from xclip_jax.cli import PathLike, explain_no_file

# FFmpeg's readers of files that hold pictures themselves. Others open further files or addresses,
# which a file of any name may list: playlists (HLS, DASH, concat), SDP, image sequences.
CONTAINERS = (
    *("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpegtsraw", "mpeg", "mpegvideo", "flv"),
    *("live_flv", "asf", "asf_o", "ogg", "rm", "mxf", "gif", "apng", "nut", "ivf", "dv", "wtv"),
    *("h264", "hevc", "m4v", "av1", "obu", "mjpeg", "yuv4mpegpipe", "nsv", "gxf"),
)
# Formats whose clock may restart, in addition to those that FFmpeg marks as such.
_JOINABLE = ("flv",)
# Formats whose packets have positions in the order of their times.
_STREAMED = ("mpegts", "flv", "matroska,webm")
_FLV_HEADER = re.compile(rb"FLV\x01[\0\1\4\5]\0\0\0\x09\0\0\0\0")
_MAX_PARTS = 1000  # of a joined FLV file
MAX_PIXELS = 2**26  # of a frame: 8,192 x 8,192
_FIRST_PICTURES = 60  # seconds of a file in which a film has at least two pictures


class VideoError(Exception):
    """The error that a video cannot be read, with a short reason as its message."""


class AccessError(VideoError):
    """The error that a file cannot be opened or read now: another attempt may succeed."""


class Film(NamedTuple):
    """The picture track of an open file."""

    container: InputContainer
    stream: VideoStream

    @property
    def second(self) -> Fraction:
        """Ticks per second of the time stamps."""
        return 1 / (self.stream.time_base or Fraction(1, 1_000_000))

    @property
    def stamp(self) -> str:
        """Attribute of a frame that holds its time stamp."""
        # AVI stores decoding times only; with B-frames, the presentation times that FFmpeg derives
        # from them are out of order.
        return "dts" if self.container.format.name == "avi" else "pts"

    @property
    def is_joinable(self) -> bool:
        """True if recordings of this format may be joined byte by byte."""
        flags = self.container.format.flags & Flags.ts_discont.value
        return bool(flags) or self.container.format.name in _JOINABLE

    def offset(self, stamp: int | None) -> float:
        """Returns the seconds from the start of the file, as players count, to a time stamp."""
        return max(0.0, float((stamp or 0) / self.second) - (self.container.start_time or 0) / 1e6)

    def count_frames(self) -> int:
        """Returns the number of frames that the header states, 0 if unknown."""
        frames, name = self.stream.frames, self.container.format.name
        if "mov" in name.split(","):  # its index has what an edit list leaves
            frames = min(frames, len(self.stream.index_entries))
        return frames

    def clock(self, heard: Sequence[int] = ()) -> "Clock":
        """Returns a new clock for the time stamps, which knows the given ones of the sound."""
        rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        sparse = self.container.format.name == "mpeg"
        return Clock(self.second, rate, joinable=self.is_joinable, sparse=sparse, heard=heard)


class PacketReader:
    """An iterator over the packets of a picture track, which tells `clock` the times of the sound.

    After the last packet, `unread` is the fraction of the file that follows it, 0 if unknown:
    another recording, with streams that FFmpeg did not find at the start. `missing` is the fraction
    of the seconds in the header of Matroska that follows the last packet, 0 if unknown.
    """

    def __init__(self, film: Film, clock: "Clock") -> None:
        self.film, self.clock, self.unread, self.missing = film, clock, 0.0, 0.0

    def __iter__(self) -> Iterator[Packet]:
        container, stream, end, last = self.film.container, self.film.stream, 0, 0.0
        is_joinable = self.film.is_joinable
        is_streamed = container.format.name in _STREAMED
        others = [s for s in container.streams if s.type in ("audio", "subtitle", "data")]
        others = others if is_joinable or is_streamed else []
        sound = next((s.index for s in others if s.type == "audio"), -1)
        with contextlib.suppress(IndexError):  # a packet of a stream that was not there before
            for packet in container.demux([stream, *others]):
                if packet.stream.index in (stream.index, sound):
                    end = max(end, (packet.pos or 0) + packet.size)
                if packet.dts is not None and packet.time_base:
                    seconds = (packet.dts + (packet.duration or 0)) * packet.time_base
                    last = max(last, float(seconds))
                if packet.stream.index == stream.index:
                    yield packet
                elif is_joinable and packet.stream.index == sound and packet.dts is not None:
                    self.clock.hear(int(packet.dts * packet.time_base * self.film.second))
        if is_streamed and container.size > 0 and end:
            self.unread = max(0.0, 1 - end / container.size)
        if container.format.name == "matroska,webm" and container.duration and last:
            length = container.duration / av.time_base
            self.missing = max(
                0.0, 1 - (last - (container.start_time or 0) / av.time_base) / length
            )


@contextlib.contextmanager
def open_film(path: PathLike, *, max_pixels: int = MAX_PIXELS) -> Iterator[Film]:
    """Opens the picture track of a video file, or raises VideoError.

    Frames of more than `max_pixels` cannot be decoded.
    """
    with contextlib.ExitStack() as stack:
        container = stack.enter_context(_open(path, max_pixels))
        streams = _picture_streams(container)
        index = streams[0].index
        if len(streams) > 1:
            index = _choose_stream(container, streams)
            container = stack.enter_context(_open(path, max_pixels))  # at the start again
        stream: Any = container.streams[index]
        stream.codec_context.thread_count = 1  # callers run one process per core
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        yield Film(container, stream)


class FirstFrame(NamedTuple):
    """The time of a film's first frame, in seconds."""

    stamp: float  # by its time stamp
    offset: float  # from the start of the file, as players count, see `Film.offset`


def find_first_frame(path: PathLike) -> FirstFrame:
    """Returns the time of the first frame that can be decoded, or raises VideoError."""
    with open_film(path) as film:
        stamp = getattr(read_first_frame(film), film.stamp)
        return FirstFrame(float((stamp or 0) / film.second), film.offset(stamp))


def read_first_frame(film: Film) -> VideoFrame:
    """Returns the first frame that can be decoded, or raises VideoError."""
    error: Exception | None = None
    try:
        for packet in PacketReader(film, film.clock()):
            try:
                frames = packet.decode()
            except (FFmpegError, ValueError) as problem:
                frames, error = [], problem
            for frame in frames:
                return frame
    except (FFmpegError, ValueError) as problem:  # of the container
        error = problem
    raise VideoError(f"no frame could be decoded: {reason(error)}")


class _JoinedFlv(io.RawIOBase):
    """An FLV file without the headers in its middle, at which FFmpeg would stop reading.

    The format: https://rtmp.veriskope.com/pdf/video_file_format_spec_v10.pdf, Annex E.
    """

    def __init__(self, path: PathLike) -> None:
        self.file = open(path, "rb")  # noqa: SIM115  (closed by `close`)
        self.size = os.fstat(self.file.fileno()).st_size
        self.parts = list(self._find_parts())  # (first byte, end)
        self.ends = list(itertools.accumulate(end - start for start, end in self.parts))
        self.place = 0

    def _find_parts(self) -> Iterator[tuple[int, int]]:
        start = 0
        with mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for header in itertools.islice(_FLV_HEADER.finditer(content), _MAX_PARTS):
                if header.start():
                    yield start, header.start()
                    start = header.end()
        yield start, self.size

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Reads up to `size` bytes of one part."""
        number = bisect.bisect_right(self.ends, self.place)
        if number == len(self.parts):
            return b""
        left = self.ends[number] - self.place
        self.file.seek(self.parts[number][1] - left)
        data = self.file.read(left if size < 0 else min(size, left))
        self.place += len(data)
        return data

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place in the file without the headers."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.ends[-1]}
        self.place = origin[whence] + place
        return self.place

    def tell(self) -> int:
        """Returns the place in the file without the headers."""
        return self.place

    def close(self) -> None:
        """Closes the file."""
        self.file.close()
        super().close()


@contextlib.contextmanager
def _open(path: PathLike, max_pixels: int) -> Iterator[InputContainer]:
    av.logging.set_level(None)  # FFmpeg would print every corrupted macroblock to stderr
    allowed = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    allowed |= {"scan_all_pmts": "1", "merge_pmt_versions": "1"}  # joined MPEG-TS: other numbers
    if problem := explain_no_file(path):
        raise VideoError(problem)
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise VideoError("empty file (0 bytes)")
    except OSError as error:
        raise AccessError(f"cannot be opened: {reason(error)}") from error
    # Absolute: a colon in a relative name looks like a protocol. Tags may be of any encoding.
    options: Any = {"container_options": allowed, "metadata_errors": "replace"}
    options["options"] = {"max_pixels": str(max_pixels)}
    with contextlib.ExitStack() as stack:
        try:
            container = stack.enter_context(av.open(os.path.abspath(path), **options))
            if container.format.name == "flv":
                joined = stack.enter_context(_JoinedFlv(path))
                if len(joined.parts) > 1:
                    container = stack.enter_context(av.open(joined, **options))
        except (OSError, ValueError, FFmpegError) as error:
            kind = AccessError if isinstance(error, OSError) else VideoError
            refused = isinstance(error, ArgumentError)  # a format outside the whitelist
            why = "it is a playlist, or of a format that is not read" if refused else reason(error)
            raise kind(f"cannot be opened: {why}") from error
        yield container


def _picture_streams(container: InputContainer) -> list[VideoStream]:
    """Returns the video streams except cover pictures, those marked as default first."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise VideoError("no video stream")
    streams = [s for s in streams if s.codec_context is not None]
    if not streams:
        raise VideoError("no decoder for the video stream")
    return sorted(streams, key=lambda s: not s.disposition & Disposition.default)


def _choose_stream(container: InputContainer, streams: list[VideoStream]) -> int:
    """Returns the index of the first of `streams` that has more than one picture, or of the first.

    A picture of the disc or of the show may be marked as the default video.
    """
    counts = dict.fromkeys((stream.index for stream in streams), 0)
    with contextlib.suppress(FFmpegError, ValueError):
        for packet in container.demux(streams):
            counts[packet.stream.index] += packet.size > 0
            seconds = (packet.dts or 0) * (packet.time_base or 0) - (
                container.start_time or 0
            ) / 1e6
            if counts[streams[0].index] > 1 or seconds > _FIRST_PICTURES:
                break
    return next((index for index, count in counts.items() if count > 1), streams[0].index)


class Clock:
    """A converter of time stamps, possibly invalid, to non-decreasing ticks since the first frame.

    A second has `second` ticks and `rate` frames. Ticks are integers: in floating point, 17.8 s -
    16.8 s is not 1 s. Steps back of more than 10 s or forward of more than an hour are a restart of
    the clock. If recordings may be `joinable`, so are steps back of more than 0.1 s and steps
    forward of more than 10 s (FFmpeg's limits, https://ffmpeg.org/ffmpeg.html), unless a picture is
    held that long: unless the sound goes on, or the step is at most 20 times the longest so far. A
    step back to the first stamp always is. `sparse` stamps, of which FFmpeg attributes some to the
    frame before, are followed only when two frames off. `heard` are time stamps of the sound.
    """

    def __init__(
        self,
        second: Fraction,
        rate: Fraction,
        *,
        joinable: bool = False,
        sparse: bool = False,
        heard: Sequence[int] = (),
    ) -> None:
        self.period = max(round(second / rate), 1)
        self.second, self.joinable = second, joinable
        self.tolerance = 2 * self.period if sparse else 0
        self.zero: int | None = None
        self.now = -self.period
        self.heard, self._first = list(heard), 0
        self._longest = 0  # step between two frames so far

    def hear(self, stamp: int) -> None:
        """Takes the time stamp of a packet of the sound, in ticks."""
        if not self.heard or abs(stamp - self.heard[-1]) >= self.second:
            self.heard.append(stamp)

    def __call__(self, stamp: int | None) -> int:
        """Returns the ticks of the next frame, whose time stamp may be None."""
        if stamp is None:
            self.now += self.period
            return self.now
        if self.zero is None:
            self.now += self.period
            self._first, self.zero = stamp, stamp - self.now
            return self.now
        if self._restarts(self.zero + self.now, stamp):
            self.zero = stamp - self.now - self.period
        step = stamp - self.zero - self.now
        if abs(step - self.period) < self.tolerance:
            step = self.period
        self._longest, self.now = max(self._longest, step), max(self.now, self.now + step)
        return self.now

    def _restarts(self, last: int, stamp: int) -> bool:
        step, back, pause = stamp - last, Fraction(10), Fraction(3600)
        if step < -self.second and stamp <= self._first + self.second / 2:
            return True
        if self.joinable:
            back = Fraction(1, 10)
            usual = 20 * self._longest / self.second
            pause = min(max(Fraction(10), usual), pause) if usual else pause
            if step > pause * self.second and self._is_heard(last, stamp):
                return False
        return not -back * self.second <= step <= pause * self.second

    def _is_heard(self, start: int, end: int) -> bool:
        """Returns True if the sound has no gap of more than 10 s from `start` to `end`."""
        heard = sorted(stamp for stamp in self.heard if start < stamp < end)
        steps = itertools.pairwise([start, *heard, end])
        return all(b - a <= 10 * self.second for a, b in steps)


def exact_seconds(value: float) -> Fraction:
    """Returns seconds as a fraction that is not below the decimal number they were given as."""
    # 0.3 is slightly less than 3/10 in floating point, and would miss the frame at 3/10 s.
    return Fraction(value).limit_denominator(1_000_000)


def reason(error: Exception | None) -> str:
    """Returns a short description of a decoder's error."""
    return getattr(error, "strerror", None) or str(error or "the file has none")
