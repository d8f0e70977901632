"""Cuts video files into segments, in worker processes."""

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av.logging
import numpy as np
from jaxtyping import UInt8

from xclip_jax.cli import explain_no_file
from xclip_jax.data.container import AccessError, VideoError, exact_seconds, open_film
from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.preprocess import FrameFormat
from xclip_jax.data.video import Picture, VideoReader, spread_times
from xclip_jax.search.digests import sample_file

THUMBNAIL_SIDE = 320  # pixels, the longer side
MIN_SHOT_FRAMES = 2  # a shorter shot is merged into the previous one
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
    overlap_seconds: int = 0  # of neighbouring segments, except at shot changes


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

    If `format` spreads frames, `max_frames` are spread over each segment instead. The frames of all
    segments are written to `frames_file`, uint8 S x S x 3 each.

    Returns:
        (segments in order, reason why there are none or the file was only partly read, or None,
        True if the reason may be temporary: the next update reads the file again).
    """
    av.logging.set_level(None)  # errors are returned
    reader, segments, sample = VideoReader(job.path), [], 0
    with contextlib.suppress(OSError):  # which the reader reports
        sample = sample_file(job.path) if explain_no_file(job.path) is None else 0
    try:
        changes, note = detect_shot_changes(job.path) if job.shots else ([], None)
        lengths = job.segment_seconds, job.overlap_seconds
        pieces = _cut(reader, job.format, lengths, changes)
        with job.frames_file.open("wb") as file:
            for start, end, first_second, frames in pieces:
                chosen = choose_frames(len(frames), job.max_frames)
                for index in chosen:
                    frames[index][0].tofile(file)
                times = [float(first_second + index) for index in chosen]
                by_distance = sorted(range(len(frames)), key=lambda k: abs(2 * k + 1 - len(frames)))
                thumbnail = next(filter(None, (frames[k][1] for k in by_distance)))
                interval = start, end or reader.end, reader.offset
                segments.append(Segment(*interval, sample, times, thumbnail))
        if job.format.spread:
            segments = _spread_frames(job, segments)
    except VideoError as error:
        return [], str(error), isinstance(error, AccessError)
    return segments, reader.note or note, False


def _spread_frames(job: SegmentJob, segments: list[Segment]) -> list[Segment]:
    """Writes frames at the starts of equal parts of each segment, as `read_frames` chooses them.

    Returns the segments with their times. The file is decoded a second time.
    """
    times = [
        spread_times(exact_seconds(one.start), exact_seconds(one.end), job.max_frames)
        for one in segments
    ]
    with job.frames_file.open("wb") as file:
        for _, picture in VideoReader(job.path, times=list(itertools.chain(*times))):
            picture.to_square(job.format).tofile(file)
    pairs = zip(segments, times, strict=True)
    return [dataclasses.replace(one, times=list(map(float, starts))) for one, starts in pairs]


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
    lengths: tuple[int, int],
    changes: list[float],
) -> Iterator[tuple[float, float | None, int, list[SampledFrame]]]:
    """Yields (start, end, second of the first frame, frames) of every segment.

    A segment ends at a shot change, after its length, the first of `lengths`, or with the file
    (end: None). The next one begins before the end by the overlap, the second of `lengths`. A
    remainder shorter than half of the length is merged into the previous segment. Only frames at
    offsets that are powers of two get a thumbnail, and, so that one is near the middle of
    overlapping segments, those at multiples of the distance of their starts.
    """
    (length, overlap), start, first_second, frames = lengths, 0.0, 0, []
    step = length - overlap
    last_change = {math.ceil(change): change for change in changes}  # of each second
    for second, (_, picture) in enumerate(pictures):
        change = last_change.get(second)
        if change is not None and len(frames) >= MIN_SHOT_FRAMES:
            yield start, change, first_second, frames
            start, first_second, frames = change, second, []
        offset = len(frames) % length
        has_thumbnail = offset & (offset - 1) == 0 or second % step == 0
        thumbnail = picture.encode_thumbnail(THUMBNAIL_SIDE) if has_thumbnail else None
        frames.append((picture.to_square(format), thumbnail))
        if 2 * len(frames) >= 3 * length and len(frames) > length:
            yield start, float(first_second + length), first_second, frames[:length]
            first_second, frames = first_second + step, frames[step:]
            start = float(first_second)
    yield start, None, first_second, frames
