"""Reads the packets of a moment of a film, with their times in seconds after its first frame."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from av import AudioFrame, Packet, VideoFrame
from av.error import FFmpegError

from xclip_jax.cli import PathLike
from xclip_jax.data.container import (
    Film,
    PacketReader,
    VideoError,
    open_film,
    read_first_frame,
    reason,
)
from xclip_jax.data.preprocess import ONE

_BACK = (0, 1, 5, 30)  # seconds before the start to which it seeks until there is a key frame
_SKEW = 3  # seconds by which a file's sound may come later than its picture, and the reverse
_PREROLL = Fraction(1, 5)  # seconds of sound before the start that its decoder needs
_MANY_PIXELS = 2**23  # of a frame: larger ones are decoded by one thread, to save memory
_MAX_THREADS = 4
Stop = Callable[[], bool] | None  # returns True when the result is no longer wanted


class ClipCancelled(Exception):
    """The error that `stop` returned True before the clip was complete."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The place in a file where reading of a moment starts.

    Times of the film are time stamps in seconds minus one of `zeros`. There are several only if
    recordings with clocks of their own were joined.
    """

    first: VideoFrame  # of the film
    zeros: tuple[Fraction, ...]
    seek: int | None = None  # time stamp to seek to; None: read from the start of the file
    key: int | None = None  # time stamp of the last key frame at or before the start, if it seeks
    key_time: Fraction = Fraction(0)  # of the film
    skipped: int = 0  # number of packets of the picture before the key frame, if it does not seek


class Moment:
    """The packets of a moment, from the last key frame at or before its start.

    A user of `packets` sets `picture_done` and `sound_done` when later packets are not needed.
    `reached_end` is True once the whole file was read.
    """

    def __init__(self, film: Film, plan: Plan, end: Fraction, stop: Stop) -> None:
        self.film, self.plan, self.end, self.stop = film, plan, end, stop
        self.sound: Any = next(iter(film.container.streams.audio), None)
        self.period = 1 / (film.stream.average_rate or film.stream.guessed_rate or Fraction(25))
        self._next = [plan.key_time, Fraction(0)]  # times of the next picture and sound
        self.picture_done, self.sound_done, self.reached_end = False, self.sound is None, False
        self.position = Fraction(0)  # time of the last packet
        context = film.stream.codec_context
        small = context.width * context.height <= _MANY_PIXELS
        context.thread_count = min(_MAX_THREADS, os.cpu_count() or 1) if small else 1

    def place(self, seconds: Fraction) -> Fraction:
        """Returns the time of the film of a time stamp that was just read."""
        times = (seconds - zero for zero in self.plan.zeros)
        return min(times, key=lambda time: abs(time - self.position))

    def packets(self) -> Iterator[tuple[Packet, Fraction | None]]:
        """Yields each packet with its presentation time, None without a time stamp.

        The last ones are empty and flush the decoders. Raises ClipCancelled.
        """
        film, plan, started, count = self.film, self.plan, False, 0
        container: Any = film.container
        if plan.seek is not None:
            container.seek(plan.seek, stream=film.stream)
        streams = [film.stream] if self.sound is None else [film.stream, self.sound]
        with contextlib.suppress(IndexError):  # a packet of a stream that was not there before
            for packet in container.demux(streams):
                _check(self.stop)
                is_picture = packet.stream.index == film.stream.index
                time = self._advance(packet, is_picture=is_picture)
                if is_picture and packet.size:
                    count += 1
                    started |= count > plan.skipped and plan.key in (None, get_stamp(packet))
                is_flush = packet.dts is None and not packet.size
                if is_flush or (packet.size and (started or not is_picture)):
                    yield packet, time
                is_late = self.position >= self.end + _SKEW
                if (self.picture_done or is_late) and (self.sound_done or is_late):
                    return
        self.reached_end = True

    def frames(self, start: Fraction) -> Iterator[tuple[VideoFrame | AudioFrame, Fraction]]:
        """Yields the decoded frames with their times, those of the sound from `start` on.

        What cannot be decoded is left out. Raises ClipCancelled.
        """
        for packet, time in self.packets():
            is_picture = packet.stream.index == self.film.stream.index
            if self.picture_done if is_picture else self.sound_done:
                continue
            if not is_picture and time is not None and time < start - _PREROLL:
                continue
            with contextlib.suppress(FFmpegError, ValueError):
                for frame in packet.decode():
                    yield frame, self._find_time(frame)
        if not self.reached_end and not self.picture_done:
            with contextlib.suppress(FFmpegError, ValueError):
                for frame in self.film.stream.codec_context.decode(None):
                    yield frame, self._find_time(frame)

    def _find_time(self, frame: VideoFrame | AudioFrame) -> Fraction:
        """Returns the time of a decoded frame: without a time stamp, the end of the last one."""
        is_sound = isinstance(frame, AudioFrame)
        stamp, base = (frame.pts if is_sound else getattr(frame, self.film.stamp)), frame.time_base
        time = self._next[is_sound]
        if stamp is not None and base:
            time = self.place(stamp * base)
        length = Fraction(frame.samples, frame.sample_rate or 1) if is_sound else self.period
        self._next[is_sound] = time + length
        return time

    def _advance(self, packet: Packet, *, is_picture: bool) -> Fraction | None:
        """Returns the presentation time of a packet."""
        stamp, base = get_stamp(packet), packet.time_base or ONE
        if packet.dts is not None:
            self.position = self.place(packet.dts * base)
        elif is_picture and packet.size:
            self.position += self.period
        return None if stamp is None else self.place(stamp * base)


def get_stamp(packet: Packet) -> int | None:
    """Returns the presentation time stamp of a packet, or the decoding one if there is none."""
    return packet.dts if packet.pts is None else packet.pts


@contextlib.contextmanager
def open_moment(path: PathLike, plan: Plan, end: Fraction, stop: Stop) -> Iterator[Moment]:
    """Opens a film to read the moment of a plan, see `make_plan`."""
    with open_film(path) as film:
        yield Moment(film, plan, end, stop)


def make_plan(path: PathLike, start: Fraction, end: Fraction, stop: Stop) -> Plan:
    """Finds the last key frame at or before `start`, in seconds after the film's first frame.

    Raises VideoError if the file cannot be read, and ClipCancelled.
    """
    with open_film(path) as film:
        try:
            first = read_first_frame(film)
            origin = (getattr(first, film.stamp) or 0) / film.second
            if not film.is_joinable and film.container.duration is not None:
                for back in _BACK:
                    seek = math.floor((origin + start - back) * film.second)
                    key = _find_key(film, seek, origin + start, stop)
                    if key is not None:
                        return Plan(first, (origin,), seek, key, key / film.second - origin)
                return Plan(first, (origin,))
            with open_film(path) as again:
                return _scan(again, first, start, end, stop)
        except (FFmpegError, ValueError, OverflowError) as error:
            raise VideoError(f"no packet at {float(start)} s: {reason(error)}") from error


def _find_key(film: Film, seek: int, start: Fraction, stop: Stop) -> int | None:
    """Returns the time stamp of the last key frame at or before `start`, or None.

    It seeks to a time stamp and reads on to `start`, which is in seconds of the time stamps.
    """
    container: Any = film.container
    try:
        container.seek(seek, stream=film.stream)
    except FFmpegError:
        return None
    key, last = None, math.floor(start * film.second)
    for packet in container.demux(film.stream):
        _check(stop)
        stamp = get_stamp(packet)
        if stamp is None or not packet.size:
            continue
        if packet.is_keyframe and stamp <= last:
            key = stamp
        if (stamp if packet.dts is None else packet.dts) > last:
            break
    return key


def _scan(film: Film, first: VideoFrame, start: Fraction, end: Fraction, stop: Stop) -> Plan:
    """Plans the reading of a file that cannot be sought, by reading the times of its packets.

    Its clock may restart. The clock of decoding times starts at the first packet, which may be
    some time before the first frame that can be decoded.
    """
    clock, zero, zeros, late = film.clock(), None, [], 0
    count, skipped, key_time = 0, 0, Fraction(0)
    for packet in PacketReader(film, clock):
        _check(stop)
        if not packet.size:
            continue
        now, count = clock(packet.dts), count + 1
        if clock.zero != zero:
            zero = clock.zero
            delay = (get_stamp(packet) or 0) - (packet.dts or 0)
            if not zeros:
                late = (getattr(first, film.stamp) or 0) - (zero or 0) - delay
            zeros.append(((zero or 0) + delay + late) / film.second)
        time = (now - late) / film.second
        if packet.is_keyframe and time <= start:
            skipped, key_time = count - 1, max(time, Fraction(0))
        if time > end + _SKEW:
            break
    return Plan(first, tuple(zeros) or (Fraction(0),), None, None, key_time, skipped)


def _check(stop: Stop) -> None:
    if stop is not None and stop():
        raise ClipCancelled("cancelled before the clip was complete")
