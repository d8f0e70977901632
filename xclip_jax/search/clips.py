"""Cuts moments out of films: copies of their packets, exact encodings, previews for browsers.

A clip that starts at a key frame can be copied, fast and without loss. Encoding gives the exact
bounds and applies the rotation and the pixel aspect ratio.
"""

import contextlib
import dataclasses
import math
import operator
import os
import re
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av import VideoFrame
from av.error import FFmpegError
from tqdm import tqdm

from xclip_jax.cli import InputError, PathLike, atomic_file, check_local, progress
from xclip_jax.data.container import VideoError, exact_seconds, reason
from xclip_jax.search.key_frames import ClipCancelled as ClipCancelled
from xclip_jax.search.key_frames import Moment, Stop, make_plan, open_moment
from xclip_jax.search.results import Hit, format_time
from xclip_jax.search.transcode import (
    EXPORT,
    PREVIEW,
    PictureTrack,
    Quality,
    SoundTrack,
    choose_encoders,
    fit_size,
)

KEY_SECONDS = 1.0  # a copied clip starts at most so much earlier than the moment
PREVIEW_SECONDS = 60  # length of a preview, at most
FORMATS = {".mp4": "mp4", ".mkv": "matroska", ".webm": "webm", ".mov": "mov"}
# Codecs that players play in a container, as FFmpeg names them. FFmpeg decides about Matroska.
_COPIED = {
    ".mp4": "h264 hevc av1 vp9 mpeg4 aac mp3 opus ac3 eac3 flac alac",
    ".mov": "h264 hevc mpeg4 mjpeg prores aac mp3 ac3 alac pcm_s16le pcm_s24le",
    ".webm": "vp8 vp9 av1 vorbis opus",
}
_OPTIONS = {".mp4": {"movflags": "+faststart"}, ".mov": {"movflags": "+faststart"}}
_LONGEST_NAME = 120  # bytes of a file's name in the name of its clip


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip that was written. Times are seconds after the film's first frame."""

    start: float  # of its first picture: before the moment's, if it was copied
    end: float
    encoded: str | None  # reason why it was encoded, None: its packets were copied


class _NotCopied(Exception):
    """The error that packets cannot be copied, with the reason."""


def export_clip(
    path: PathLike,
    start: float,
    end: float,
    output: PathLike,
    *,
    reencode: bool = False,
    stop: Stop = None,
) -> Clip:
    """Writes the moment [start, end) of a film, in seconds after its first frame, as a new file.

    The suffix of `output` decides the container: .mp4, .mkv, .webm, .mov. Packets of the picture
    and of the first sound track are copied, from the last key frame at or before `start`. If that
    is more than KEY_SECONDS before it, or the codecs do not fit the container, or with `reencode`,
    the moment is encoded: then it starts with the picture shown at `start`, upright, with square
    pixels. An existing file is replaced. `stop` is called often and cancels by returning True.

    Raises:
        InputError: the bounds or `output` are invalid, or it cannot be written.
        VideoError: the film cannot be read.
        ClipCancelled: `stop` returned True. Nothing was written.
    """
    suffix, span = _check(path, start, end, output, tuple(FORMATS))
    plan = make_plan(path, *span, stop)
    with _write(output) as partial:
        why = "as asked"
        if not reencode:
            try:
                with open_moment(path, plan, span[1], stop) as moment:
                    return _copy(moment, span, partial, suffix)
            except _NotCopied as error:
                why = str(error)
        with open_moment(path, plan, span[1], stop) as moment:
            until = _encode(moment, span, partial, suffix, EXPORT)
        return Clip(start, float(until), why)


def make_preview(
    path: PathLike,
    start: float,
    end: float,
    output: PathLike,
    *,
    height: int = 360,
    stop: Stop = None,
) -> Clip:
    """Writes the moment of a film as a small .mp4 that browsers play, quickly.

    It has H.264 of the baseline profile (VP9 if PyAV has no encoder for it) and AAC, is at most
    `height` pixels high, has at most 31 pictures a second, and PREVIEW_SECONDS of the moment at
    most. A .webm has VP9 and Opus. Otherwise it is like an encoded `export_clip`, and raises the
    same errors.
    """
    if height < 2:
        raise InputError(f"height={height}: must be at least 2")
    end = min(end, start + PREVIEW_SECONDS)
    suffix, span = _check(path, start, end, output, (".mp4", ".webm"))
    plan = make_plan(path, *span, stop)
    quality = dataclasses.replace(PREVIEW, height=height)
    with _write(output) as partial, open_moment(path, plan, span[1], stop) as moment:
        until = _encode(moment, span, partial, suffix, quality)
    return Clip(start, float(until), "for browsers")


def save_clips(hits: Sequence[Hit], folder: PathLike) -> tuple[list[Path], dict[str, str]]:
    """Exports the moment of each hit to a folder, as "01 name 0m08s-0m16s.mp4".

    Shows a progress bar. Returns the new files, and for each one that failed the reason.
    """
    folder, files, failed = check_local("--save_clips", folder), [], {}
    folder.mkdir(parents=True, exist_ok=True)
    bar: tqdm = progress(len(hits), "writing", "clip")
    with bar:
        for hit in hits:
            file = folder / f"{hit.rank:02} {name_clip(hit.path, hit.start, hit.end)}"
            try:
                export_clip(hit.path, hit.start, hit.end, file)
                files.append(file)
            except (VideoError, InputError) as error:
                failed[file.name] = str(error)
            bar.update()
    return files, failed


def print_saved(files: Sequence[Path], failed: dict[str, str]) -> None:
    """Reports the result of `save_clips` on stderr."""
    for name, why in failed.items():
        print(f"not written: {name}: {why}", file=sys.stderr)
    if files:
        print(f"clips: {len(files):,} in {files[0].parent}", file=sys.stderr)


def run_clip(path: str, start: str, end: str, output: str, *, reencode: bool) -> None:
    """Runs the command `clip`. Raises InputError."""
    times = parse_time("--start", start), parse_time("--end", end)
    try:
        clip = export_clip(path, *times, output, reencode=reencode)
    except VideoError as error:
        raise InputError(f"{path}: {error}") from error
    how = "copied" if clip.encoded is None else f"encoded ({clip.encoded})"
    print(f"{output}: {clip.start:.2f} s to {clip.end:.2f} s, {how}")


def name_clip(path: PathLike, start: float, end: float, suffix: str = ".mp4") -> str:
    """Returns the name of a clip's file, such as "name 0m08s-0m16s.mp4", valid on every system."""
    text = os.fsencode(os.path.splitext(os.path.basename(path))[0]).decode("utf-8", "replace")
    text = re.sub(r'[\x00-\x1f\x7f-\x9f<>:"/\\|?*\u2028-\u202e\u2066-\u2069\ufffd]', "_", text)
    text = text.encode()[:_LONGEST_NAME].decode("utf-8", "ignore").strip(" .") or "clip"
    return f"{text} {_name_time(start)}-{_name_time(math.ceil(end))}{suffix}"


def _name_time(seconds: float) -> str:
    parts = format_time(seconds).split(":")  # a file name has no colons
    return "".join(map(operator.add, parts, "hms"[-len(parts) :]))


def parse_time(name: str, text: str) -> float:
    """Returns the seconds of a time such as 83, 83.5, 1:23 or 1:02:03, or raises InputError."""
    parts = text.split(":")
    numbers = [r"[0-9]+"] * (len(parts) - 1) + [r"[0-9]+(\.[0-9]+)?"]
    if len(parts) <= 3 and all(map(re.fullmatch, numbers, parts)):
        values = [float(part) for part in parts]
        if all(value < 60 for value in values[1:]) and values[0] < 1e9:
            return sum(value * 60**power for power, value in enumerate(reversed(values)))
    raise InputError(f"{name}={text}: must be seconds, m:ss or h:mm:ss")


def _check(
    path: PathLike, start: float, end: float, output: PathLike, suffixes: Sequence[str]
) -> tuple[str, tuple[Fraction, Fraction]]:
    """Returns the suffix of `output` and the exact (start, end), or raises InputError."""
    target = check_local("--output", output)
    suffix = target.suffix.lower()
    if suffix not in suffixes:
        raise InputError(f"--output={output}: must end in {', '.join(suffixes)}")
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start < end):
        problem = f"start {start:g} s, end {end:g} s"
        raise InputError(f"{problem}: end must be after start, and both at least 0")
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file")
    if os.path.exists(target) and os.path.samefile(path, target):
        raise InputError(f"--output={output}: is the film itself")
    return suffix, (exact_seconds(start), exact_seconds(end))


@contextlib.contextmanager
def _write(output: PathLike) -> Iterator[Path]:
    """Yields the path of a new file that replaces `output`, or raises InputError."""
    target = Path(os.path.abspath(output))  # a colon in a relative name looks like a protocol
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as partial:
            yield partial
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {reason(error)}") from error
    except FFmpegError as error:
        raise VideoError(f"cannot be encoded: {reason(error)}") from error


def _copy(moment: Moment, span: tuple[Fraction, Fraction], partial: Path, suffix: str) -> Clip:
    """Copies the packets of a moment, or raises _NotCopied."""
    film, key, (start, end) = moment.film, moment.plan.key_time, span
    options = _check_copy(moment, start, suffix)
    held, until = [], key  # packets of pictures after the end that others may need
    try:
        with av.open(str(partial), "w", **options) as output:
            streams = [film.stream, moment.sound] if moment.sound else [film.stream]
            copies = {s.index: output.add_stream_from_template(s) for s in streams}
            for packet, time in moment.packets():
                if time is None or not packet.size:
                    continue
                base, stamp = packet.time_base, packet.pts
                is_picture = packet.stream.index == film.stream.index
                if stamp is None or packet.dts is None:
                    raise _NotCopied("packets have no time stamps")
                if is_picture:
                    moment.picture_done = packet.dts * base - moment.plan.zeros[0] >= end
                    if packet.is_discard:
                        raise _NotCopied("the film's edit list hides pictures")
                else:
                    moment.sound_done = time >= end
                if time < key or (packet.is_discard or time >= end) > is_picture:
                    continue  # among them pictures of an open GOP that cannot be decoded
                shift = round((key + moment.plan.zeros[0]) / base)
                packet.pts, packet.dts = stamp - shift, packet.dts - shift
                packet.stream = copies[packet.stream.index]
                if not is_picture:
                    output.mux(packet)
                    continue
                held.append(packet)
                if time < end:
                    until = max(until, time + max((packet.duration or 0) * base, moment.period))
                    output.mux(held)
                    held = []
        if until <= start:
            raise _NotCopied("the file ends before")
        _check_plays(partial, options["format"])
    except (FFmpegError, ValueError) as error:
        if isinstance(error, OSError):  # the disk is full, and the like
            raise
        raise _NotCopied(f"packets cannot be copied: {reason(error)}") from error
    return Clip(float(key), float(min(until, end)), None)


def _check_copy(moment: Moment, start: Fraction, suffix: str) -> dict[str, Any]:
    """Returns the options of the output, or raises _NotCopied."""
    early, streams = start - moment.plan.key_time, [moment.film.stream]
    streams += [moment.sound] if moment.sound else []
    if early > KEY_SECONDS:
        raise _NotCopied(f"the last key frame is {float(early):.1f} s before the start")
    if len(moment.plan.zeros) > 1:
        raise _NotCopied("the film consists of joined recordings")
    for stream in streams:
        name = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
        if name not in _COPIED.get(suffix, name).split():
            raise _NotCopied(f"a {suffix} file has no {name}")
    return {"format": FORMATS[suffix], "options": _OPTIONS.get(suffix, {})}


def _check_plays(partial: Path, format: str) -> None:
    """Raises _NotCopied if the first picture of a file cannot be decoded."""
    try:
        with av.open(str(partial), format=format) as container:
            frame = next(container.decode(video=0), None)
    except (FFmpegError, IndexError) as error:
        raise _NotCopied(f"a copy cannot be read: {reason(error)}") from error
    if frame is None:
        raise _NotCopied("a copy has no picture")


def _encode(
    moment: Moment, span: tuple[Fraction, Fraction], partial: Path, suffix: str, quality: Quality
) -> Fraction:
    """Encodes a moment, and returns the end of its last picture, in seconds of the film."""
    film, (start, end), until = moment.film, span, Fraction(0)
    video, audio = choose_encoders(suffix)
    aspect = film.stream.sample_aspect_ratio
    size = fit_size(moment.plan.first, aspect, quality.height)
    has_sound = moment.sound is not None and moment.sound.codec_context is not None
    moment.sound_done = not has_sound
    options: Any = {"format": FORMATS[suffix], "options": _OPTIONS.get(suffix, {})}
    with av.open(str(partial), "w", **options) as output:
        picture = PictureTrack(output, video, quality, size=size, span=span)
        sound = SoundTrack(output, audio, quality, start, end) if has_sound else None
        for frame, time in moment.frames(start):
            if isinstance(frame, VideoFrame):
                picture.add(frame, time, aspect)
                moment.picture_done = picture.is_done
            elif sound is not None:
                sound.add(frame, time)
                moment.sound_done = sound.is_done
        picture.close(moment.period if moment.reached_end else None)
        until = picture.until
        if until > start and sound is not None:
            sound.close(until)
    if not picture.until:
        raise VideoError("no frame could be decoded")
    if until <= start:
        raise InputError(f"start {float(start):g} s: the film ends at {float(until):g} s")
    return until
