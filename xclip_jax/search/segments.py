"""Cuts video files into segments, in worker processes."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av.logging
import numpy as np
from jaxtyping import UInt8

from xclip_jax.cli import explain_no_file
from xclip_jax.data.container import AccessError, VideoError, open_film
from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.preprocess import FrameFormat
from xclip_jax.data.video import Picture, VideoReader, choose_rate
from xclip_jax.search.digests import sample_file

THUMBNAIL_SIDE = 320  # pixels, the longer side
MIN_SHOT_FRAMES = 2  # at one a second; a shorter shot is merged into the previous one
SampledFrame = tuple[UInt8[np.ndarray, "S S 3"], bytes | None]  # with its JPEG thumbnail, or None


@dataclasses.dataclass(frozen=True)
class SegmentJob:
    """A video file to cut."""

    path: str
    frames_file: Path  # the file that the frames are written to
    format: FrameFormat  # of the model
    max_frames: int  # of the model
    segment_seconds: int  # length of a segment
    shots: bool = False  # True: cut at shot changes as well


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a video file. All times are seconds after the file's first frame."""

    start: float
    end: float
    offset: float  # from the start of the file, as players count, to its first frame
    sample: int  # of the file's content, see `sample_file`
    times: list[float]  # of its n frames, 1 <= n <= max_frames
    thumbnail: bytes  # JPEG of a frame near the middle


def read_segments(job: SegmentJob) -> tuple[list[Segment], str | None, bool]:
    """Cuts a file, keeping one frame a second and at most `max_frames` of a segment.

    If `format` spreads frames, `max_frames` of every segment are kept, some repeatedly if there are
    fewer. The frames of all segments are written to `frames_file`, uint8 S x S x 3 each.

    Returns:
        (segments in order, reason why there are none or the file was only partly read, or None,
        True if the reason may be temporary: the next update reads the file again).
    """
    av.logging.set_level(None)  # errors are returned
    segments, sample = [], 0
    with contextlib.suppress(OSError):  # which the reader reports
        sample = sample_file(job.path) if explain_no_file(job.path) is None else 0
    try:
        changes, note = detect_shot_changes(job.path) if job.shots else ([], None)
        rate = choose_rate(job.path, job.segment_seconds, job.format)
        reader = VideoReader(job.path, period=Fraction(1, rate))
        pieces = _cut(reader, job.format, job.segment_seconds, rate, changes)
        with job.frames_file.open("wb") as file:
            for start, end, first, frames in pieces:
                spread = job.format.spread > 0
                chosen = choose_frames(len(frames), job.max_frames, spread=spread)
                for index in chosen:
                    frames[index][0].tofile(file)
                times = [float((first + index) / rate) for index in chosen]
                by_distance = sorted(range(len(frames)), key=lambda k: abs(2 * k + 1 - len(frames)))
                thumbnail = next(filter(None, (frames[k][1] for k in by_distance)))
                interval = start, end or reader.end, reader.offset
                segments.append(Segment(*interval, sample, times, thumbnail))
    except VideoError as error:
        return [], str(error), isinstance(error, AccessError)
    return segments, reader.note or note, False


def detect_shot_changes(path: str) -> tuple[list[float], str | None]:
    """Returns (times of the shot changes in seconds, None), or ([], reason of the failure).

    Raises VideoError if the file is no video.
    Content detection of https://www.scenedetect.com: jumps in mean hue, saturation and brightness.
    """
    import scenedetect  # an optional dependency

    with open_film(path):  # raises VideoError for a playlist, which scenedetect would follow
        pass
    logging.getLogger("pyscenedetect").setLevel(logging.CRITICAL)
    try:
        video = scenedetect.open_video(path, backend="pyav", suppress_output=True)
        manager = scenedetect.SceneManager()
        manager.add_detector(scenedetect.ContentDetector())
        manager.detect_scenes(video)
    except Exception as error:  # its decoder raises many types
        return [], f"shot detection failed: {type(error).__name__}: {error}"
    return [start.seconds for start, _ in manager.get_scene_list()[1:]], None


def load_frames(job: SegmentJob, segments: Sequence[Segment]) -> Iterator[np.ndarray]:
    """Yields the frames of each segment, uint8 F x S x S x 3, from the job's `frames_file`."""
    with job.frames_file.open("rb") as file:
        for segment in segments:
            side = job.format.image_size
            shape = (len(segment.times), side, side, 3)
            yield np.fromfile(file, np.uint8, count=np.prod(shape)).reshape(shape)


def _cut(
    pictures: Iterable[tuple[float, Picture]],
    format: FrameFormat,
    seconds: int,
    rate: int,
    changes: list[float],
) -> Iterator[tuple[float, float | None, int, list[SampledFrame]]]:
    """Yields (start, end, index of the first frame, frames) of every segment.

    There are `rate` pictures per second. A segment ends at a shot change, after `seconds`, or with
    the file (end: None). A remainder shorter than half of `seconds` is merged into the previous
    segment. Only frames at offsets that are powers of two get a thumbnail: one is near the middle
    of any segment.
    """
    start, first, frames, length = 0.0, 0, [], seconds * rate
    last_change = {math.ceil(change * rate): change for change in changes}  # before each picture
    for index, (_, picture) in enumerate(pictures):
        change = last_change.get(index)
        if change is not None and len(frames) >= MIN_SHOT_FRAMES * rate:
            yield start, change, first, frames
            start, first, frames = change, index, []
        offset = len(frames) % length
        thumbnail = picture.encode_thumbnail(THUMBNAIL_SIDE) if offset & (offset - 1) == 0 else None
        frames.append((picture.to_square(format), thumbnail))
        if 2 * len(frames) >= 3 * length and len(frames) > length:
            end = (first + length) / rate
            yield start, end, first, frames[:length]
            start, first, frames = end, first + length, frames[length:]
    yield start, None, first, frames
