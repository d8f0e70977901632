"""Reads the sound of a video file in pieces, in one channel, with the times of the film."""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from av import AudioFrame, AudioResampler
from av.error import FFmpegError
from av.stream import Disposition
from jaxtyping import Float32

from xclip_jax.cli import PathLike
from xclip_jax.data.container import Clock, Film, VideoError, find_first_frame, open_film, reason

RATE = 16_000  # samples a second
PIECE_SECONDS = 600  # at most, of a piece
MAX_SECONDS = 24 * 3600  # of a file; the rest is not read
_CUT_SECONDS = 30  # at the end of a piece, in which the quietest moment is chosen to cut
_QUIET = RATE // 10  # samples over which the volume is compared
_LONGEST_GAP = 10  # seconds without sound that are filled with silence
_SHORTEST_GAP = 0.1  # shorter ones are errors of the time stamps
_RATES = (4_000, 768_000)  # samples a second; others would be expanded without limit

Samples = Float32[np.ndarray, "N"]


class Piece(NamedTuple):
    """A part of the sound, in [-1, 1]."""

    start: float  # seconds after the file's first frame, perhaps negative
    samples: Samples  # RATE a second


def read_sound(path: PathLike) -> Iterator[Piece]:
    """Yields the sound of a film in pieces of at most PIECE_SECONDS, nothing without sound.

    Of several tracks, the first one that is marked as the default is read. Raises VideoError if the
    file cannot be opened, or no frame or none of its sound can be decoded.
    """
    zero = find_first_frame(path).stamp
    with open_film(path) as film:
        stream = _choose_stream(film)
        if stream is None:
            return
        start = 0.0  # of the samples in `parts`
        parts: list[Samples] = []
        count = 0
        for time, samples in _decode(film, stream):
            time -= zero
            gap = time - start - count / RATE
            if not parts or gap > _LONGEST_GAP:
                if parts:
                    yield Piece(start, np.concatenate(parts))
                start, parts, count = time, [], 0
            elif gap > _SHORTEST_GAP:
                parts.append(np.zeros(int(gap * RATE), np.float32))
                count += len(parts[-1])
            parts.append(samples)
            count += len(samples)
            while count >= PIECE_SECONDS * RATE:
                whole = np.concatenate(parts)
                cut = _find_quiet(whole[: PIECE_SECONDS * RATE])
                yield Piece(start, whole[:cut])
                start, parts, count = start + cut / RATE, [whole[cut:]], len(whole) - cut
        if count:
            yield Piece(start, np.concatenate(parts))


def _choose_stream(film: Film) -> Any:
    """Returns the audio stream to read, or None if there is none that can be decoded."""
    streams = [s for s in film.container.streams.audio if s.codec_context is not None]
    return min(streams, key=lambda s: not s.disposition & Disposition.default, default=None)


def _decode(film: Film, stream: Any) -> Iterator[tuple[float, Samples]]:
    """Yields (seconds by the time stamps, samples) of every frame, up to an error."""
    stream.codec_context.thread_count = 1
    resample, clock, first, ticks = _Resampler(), None, 0.0, Fraction(1)
    error: Exception | None = None
    count = 0
    with contextlib.suppress(IndexError):  # a packet of a stream that was not there before
        for frame in _decode_frames(film, stream):
            if isinstance(frame, Exception):
                error = frame
                continue
            if not _RATES[0] <= frame.sample_rate <= _RATES[1]:
                raise VideoError(f"the sound has {frame.sample_rate} samples a second")
            if clock is None:
                ticks = 1 / Fraction(frame.time_base or stream.time_base)
                rate = Fraction(frame.sample_rate, max(frame.samples, 1))
                clock = Clock(ticks, rate, joinable=film.is_joinable)
                first = float((frame.pts or 0) / ticks)
            time = float(clock(frame.pts) / ticks)
            if time > MAX_SECONDS:
                return
            for samples in resample(frame):
                count += len(samples)
                yield first + time, samples
                time += len(samples) / RATE
    if error and not count:
        raise VideoError(f"no sound could be decoded: {reason(error)}")


def _decode_frames(film: Film, stream: Any) -> Iterator[AudioFrame | Exception]:
    """Yields the frames, and the errors of packets that cannot be decoded."""
    try:
        for packet in film.container.demux(stream):
            try:
                yield from packet.decode()
            except (FFmpegError, ValueError) as error:
                yield error
    except (FFmpegError, ValueError) as error:  # of the container
        yield error


class _Resampler:
    """A converter of frames, whose format may change, to one channel of RATE samples a second."""

    def __init__(self) -> None:
        self.format: tuple[str, str, int] | None = None
        self.resampler: AudioResampler | None = None

    def __call__(self, frame: AudioFrame) -> Iterator[Samples]:
        format = frame.format.name, frame.layout.name, frame.sample_rate
        if self.resampler is None or format != self.format:
            self.format, self.resampler = format, AudioResampler("flt", "mono", RATE)
        frame.pts = None  # the clock has the times, which may jump
        for result in self.resampler.resample(frame):
            samples = result.to_ndarray().reshape(-1).astype(np.float32, copy=False)
            yield np.clip(np.nan_to_num(samples), -1.0, 1.0)


def _find_quiet(samples: Samples) -> int:
    """Returns the index of the middle of the quietest moment near the end."""
    rest = samples[-_CUT_SECONDS * RATE :]
    rest = rest[: len(rest) // _QUIET * _QUIET].reshape(-1, _QUIET)
    quietest = int(np.square(rest).mean(1).argmin())
    return len(samples) - min(_CUT_SECONDS * RATE, len(samples)) + quietest * _QUIET + _QUIET // 2
