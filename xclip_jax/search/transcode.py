"""Encodes pictures and sound: upright, square pixels, even sizes, in time with each other."""

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
from av import AudioFrame, AudioResampler, Codec, VideoFrame
from av.codec.codec import UnknownCodecError
from av.container import OutputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.video.reformatter import ColorRange, Colorspace

from xclip_jax.cli import InputError
from xclip_jax.data.preprocess import ONE
from xclip_jax.data.video import HDR, TO_SRGB, check_aspect, find_orientation, replace_matrix

MAX_SIDE = 3840  # pixels: bounds the memory of an encoder, which holds some tens of pictures
TICK = Fraction(1, 90_000)  # second, of the time stamps of encoded pictures
SOUND_RATE = 48_000
_DRIFT = SOUND_RATE * 30 // 1000  # samples by which sound may be late or early before it is moved
_HELD = Fraction(1, 2)  # second: a last picture shown longer is encoded again near its end
_TURNS = {90: "transpose=cclock", 180: "hflip,vflip", 270: "transpose=clock"}  # to the left


@dataclasses.dataclass(frozen=True)
class Quality:
    """Options of the encoders."""

    video: dict[str, dict[str, str]]  # of each encoder, the preferred one first
    sound_bits: int  # per second
    height: int = MAX_SIDE  # of the picture, at most
    step: Fraction = Fraction(0)  # seconds between two pictures, at least


# Without B-frames: an MP4's length would be wrong if a picture is held for seconds.
EXPORT = Quality(
    {
        "libx264": {"preset": "veryfast", "crf": "20", "bf": "0"},
        "libvpx-vp9": {"crf": "31", "b": "0", "cpu-used": "5", "row-mt": "1", "deadline": "good"},
    },
    sound_bits=160_000,
)
# A baseline stream has no B-frames and no CABAC: every decoder plays it. Key frames every 2 s.
_FAST_H264 = {"preset": "superfast", "profile": "baseline", "crf": "26", "g": "60"}
_FAST_VP9 = {"crf": "38", "b": "0", "cpu-used": "8", "row-mt": "1", "deadline": "realtime"}
PREVIEW = Quality(
    {"libx264": _FAST_H264, "libvpx-vp9": _FAST_VP9 | {"g": "60"}},
    sound_bits=96_000,
    step=Fraction(1, 31),
)
# Encoders that a container takes and players play in it.
_VIDEO = {
    ".mp4": ("libx264", "libvpx-vp9"),
    ".mkv": ("libx264", "libvpx-vp9"),
    ".mov": ("libx264",),
    ".webm": ("libvpx-vp9",),
}
_SOUND = {".webm": ("libopus",)}
_AAC = ("aac",)


def choose_encoders(suffix: str) -> tuple[str, str]:
    """Returns the names of the video and the sound encoder for a file name's suffix.

    Raises InputError if PyAV was built without them. The wheel has all.
    """
    names = []
    for encoders in (_VIDEO[suffix], _SOUND.get(suffix, _AAC)):
        available = [name for name in encoders if has_encoder(name)]
        if not available:
            needed = " or ".join(encoders)
            advice = "install the wheel of PyAV" + ", or write .webm" * (suffix != ".webm")
            raise InputError(f"{suffix}: PyAV was built without the encoder {needed}: {advice}")
        names.append(available[0])
    return names[0], names[1]


def has_encoder(name: str) -> bool:
    """Returns True if PyAV was built with an encoder."""
    try:
        return Codec(name, "w") is not None
    except UnknownCodecError:
        return False


def fit_size(frame: VideoFrame, pixel_aspect: Fraction | None, height: int) -> tuple[int, int]:
    """Returns the even width and height of an upright picture, at most `height` high."""
    wide, high = frame.width * check_aspect(pixel_aspect), Fraction(frame.height)
    if find_orientation(frame)[1] % 180:
        wide, high = high, wide
    scale = min(ONE, height / high, MAX_SIDE / wide, MAX_SIDE / high)
    return max(2, int(wide * scale) // 2 * 2), max(2, int(high * scale) // 2 * 2)


class PictureTrack:
    """The encoder of a clip's pictures, which are shown from `start` to `end` of the film.

    The first one is the last shown by `start`. `until` is the end of the last one in the film, so
    far, and `is_done` is True when the picture of `end` was added.
    """

    def __init__(
        self,
        output: OutputContainer,
        codec: str,
        quality: Quality,
        *,
        size: tuple[int, int],
        span: tuple[Fraction, Fraction],
    ) -> None:
        self.output, self.size, self.step = output, size, quality.step
        self.start, self.end = span
        stream: Any = output.add_stream(codec, rate=30, options=quality.video[codec])
        stream.width, stream.height = size
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", TICK
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.thread_count = 0  # as many as there are cores
        self.stream, self.until, self.is_done = stream, Fraction(0), False
        self._shown: tuple[VideoFrame, Fraction, Fraction] | None = None
        self._last: int | None = None  # time stamp of the last picture
        self._durations: dict[int, int] = {}
        self._graphs: dict[Any, Any] = {}

    def add(self, frame: VideoFrame, time: Fraction, pixel_aspect: Fraction | None) -> None:
        """Takes a frame at a time of the film, in the order in which they are shown."""
        shown = self._shown
        if shown is not None and time <= shown[1]:
            return
        if shown is not None and time > self.start:
            self._encode(min(time, self.end))
        self._shown, self.is_done = (frame, time, check_aspect(pixel_aspect)), time >= self.end

    def close(self, period: Fraction | None) -> None:
        """Ends the track: the film's last picture is shown for `period` seconds, None if longer."""
        if self._shown is not None and not self.is_done:
            frame, time, _ = self._shown
            length = max((frame.duration or 0) * (frame.time_base or ONE), period or 0)
            self._encode(self.end if period is None else min(time + length, self.end))
        if self._last is not None:
            self._mux(self.stream.encode(None))

    def _encode(self, until: Fraction) -> None:
        """Encodes the picture that is shown until a time of the film."""
        assert self._shown is not None
        frame, time, aspect = self._shown
        self.until = until
        begin = max(time - self.start, Fraction(0)) if self._last is not None else Fraction(0)
        first, last = round(begin / TICK), round((until - self.start) / TICK)
        if last <= first or (self._last is not None and first < self._last + self.step / TICK):
            return
        picture = self._convert(frame, aspect)
        stamps = [first]
        if last - first > _HELD / TICK:  # players do not agree on how long a last one is shown
            stamps.append(last - round(_HELD / 5 / TICK))
        for stamp, after in zip(stamps, [*stamps[1:], last], strict=True):
            picture.pts, picture.time_base = stamp, TICK
            self._durations[stamp], self._last = after - stamp, stamp
            self._mux(self.stream.encode(picture))

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts, packet.duration or 0)
            self.output.mux(packet)

    def _convert(self, frame: VideoFrame, aspect: Fraction) -> VideoFrame:
        try:
            return self._filter(frame, aspect)
        except FFmpegError:
            replace_matrix(frame)
            return self._filter(frame, aspect)

    def _filter(self, frame: VideoFrame, aspect: Fraction) -> VideoFrame:
        form: Any = (
            frame.width,
            frame.height,
            frame.format.name,
            frame.colorspace,
            frame.color_trc,
        )
        form += (aspect, frame.color_range, *find_orientation(frame))
        if form not in self._graphs:
            self._graphs = {form: self._make_graph(frame, aspect)}  # one: old ones hold memory
        graph = self._graphs[form]
        frame.pts = None
        graph.push(frame)
        return graph.pull()

    def _make_graph(self, frame: VideoFrame, aspect: Fraction) -> Graph:
        is_flipped, degrees = find_orientation(frame)
        # A frame of another shape than the first one gets a border.
        wide, high = frame.width * aspect, Fraction(frame.height)
        wide, high = (high, wide) if degrees % 180 else (wide, high)
        scale = min(self.size[0] / wide, self.size[1] / high)
        inner = [
            size if size - 4 < value * scale else max(2, int(value * scale) // 2 * 2)
            for value, size in zip((wide, high), self.size, strict=True)
        ]
        width, height = reversed(inner) if degrees % 180 else inner
        filters = [f"scale={width}:{height}:flags=bicubic"]
        if frame.color_trc in HDR:
            filters += [f"scale={TO_SRGB}", "format=rgb24"]
        filters += ["scale=out_color_matrix=bt709:out_range=tv", "format=yuv420p"]
        filters += ["vflip"] * is_flipped + ([_TURNS[degrees]] if degrees else [])
        filters += [f"pad={self.size[0]}:{self.size[1]}:-1:-1"] * (tuple(inner) != self.size)
        graph = Graph()
        size: Any = {"width": frame.width, "height": frame.height, "format": frame.format.name}
        nodes = [graph.add_buffer(**size, time_base=TICK)]
        for text in ",".join([*filters, "setsar=1"]).split(","):
            name, _, arguments = text.partition("=")
            nodes.append(graph.add(name, arguments or None))
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        return graph


class SoundTrack:
    """The encoder of a clip's sound, with silence where the film has none."""

    def __init__(
        self, output: OutputContainer, codec: str, quality: Quality, start: Fraction, end: Fraction
    ) -> None:
        self.output, self.start, self.end = output, start, end
        stream: Any = output.add_stream(codec, rate=SOUND_RATE, layout="stereo")
        stream.codec_context.bit_rate = quality.sound_bits
        self.stream, self.is_done = stream, False
        self._written = 0  # samples
        self._form: Any = None
        self._resampler: Any = None

    def add(self, frame: AudioFrame, time: Fraction) -> None:
        """Takes the sound of a time of the film."""
        if time >= self.end:
            self.is_done = True
            return
        form = frame.format.name, frame.layout.name, frame.sample_rate
        if form != self._form:
            options: Any = {"format": "fltp", "layout": "stereo", "rate": SOUND_RATE}
            self._form, self._resampler = form, AudioResampler(**options)
        frame.pts = None
        try:
            parts = [part.to_ndarray() for part in self._resampler.resample(frame)]
        except (FFmpegError, ValueError):  # a layout that cannot be mixed
            return
        if parts:
            self._place(np.concatenate(parts, axis=1), round((time - self.start) * SOUND_RATE))

    def close(self, until: Fraction) -> None:
        """Ends the track, with silence up to a time of the film."""
        self._write_silence(round((until - self.start) * SOUND_RATE) - self._written)
        self.output.mux(self.stream.encode(None))

    def _place(self, samples: np.ndarray, position: int) -> None:
        """Writes samples at their position: moved if it differs from what is written so far."""
        gap = position - self._written
        if gap < 0 and (self._written == 0 or gap < -_DRIFT):
            samples = samples[:, -gap:]
        elif gap > 0 and (self._written == 0 or gap > _DRIFT):
            self._write_silence(gap)
        left = round((self.end - self.start) * SOUND_RATE) - self._written
        self._write(samples[:, : max(left, 0)])

    def _write_silence(self, count: int) -> None:
        while count > 0:  # in parts: a film's sound may start after hours
            part = min(count, SOUND_RATE)
            self._write(np.zeros((2, part), np.float32))
            count -= part

    def _write(self, samples: np.ndarray) -> None:
        if not samples.shape[1]:
            return
        frame = AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", "stereo")
        frame.sample_rate, frame.pts = SOUND_RATE, self._written
        frame.time_base = Fraction(1, SOUND_RATE)
        self._written += samples.shape[1]
        self.output.mux(self.stream.encode(frame))
