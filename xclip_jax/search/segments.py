"""Cuts video files into segments in worker processes."""

import collections
import dataclasses
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av.logging
import numpy as np
from jaxtyping import UInt8

from xclip_jax.cli import InputError
from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.video import Picture, VideoError, VideoReader

THUMBNAIL_SIDE = 320  # pixels, the longer side
MIN_SHOT_FRAMES = 2  # a shorter shot is merged into the previous one
SampledFrame = tuple[UInt8[np.ndarray, "S S 3"], bytes | None]  # with its JPEG thumbnail, or None


@dataclasses.dataclass(frozen=True)
class SegmentJob:
    """A video file to cut.

    Attributes:
        path: the video file.
        frames_file: the file that the frames are written to.
        image_size, max_frames: of the model.
        segment_seconds: length of a segment, whole seconds.
        shots: True to cut at shot changes as well.
    """

    path: str
    frames_file: Path
    image_size: int
    max_frames: int
    segment_seconds: int
    shots: bool = False


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a video file.

    Attributes:
        start, end: seconds after the file's first frame.
        times: seconds of its n frames, 1 <= n <= max_frames, on the same clock.
        thumbnail: JPEG of a frame near the middle.
    """

    start: float
    end: float
    times: list[float]
    thumbnail: bytes


@dataclasses.dataclass(frozen=True)
class SegmentedFile:
    """The segments of a video file, in order.

    Attributes:
        segments: their frames are concatenated in the job's `frames_file`, uint8 S x S x 3 each.
        failure: the reason why there are none, or None.
        note: the reason why the file was only partly read, or None.
    """

    segments: list[Segment]
    failure: str | None = None
    note: str | None = None


def read_segments(job: SegmentJob) -> SegmentedFile:
    """Cuts a file, keeping one frame a second and at most `max_frames` of a segment."""
    av.logging.set_level(None)  # errors are reported as `failure` and `note`
    reader = VideoReader(job.path)
    starts, times, thumbnails = [], [], []
    try:
        changes, note = detect_shot_changes(job.path) if job.shots else ([], None)
        with job.frames_file.open("wb") as file:
            for start, first_second, frames in _cut(
                reader, job.image_size, job.segment_seconds, changes
            ):
                chosen = choose_frames(len(frames), job.max_frames)
                for index in chosen:
                    frames[index][0].tofile(file)
                starts.append(start)
                times.append([float(first_second + index) for index in chosen])
                thumbnails.append(_middle_thumbnail(frames))
    except VideoError as error:
        return SegmentedFile([], failure=str(error))
    ends = [*starts[1:], reader.end]
    segments = list(map(Segment, starts, ends, times, thumbnails))
    return SegmentedFile(segments, note=reader.note or note)


def detect_shot_changes(path: str) -> tuple[list[float], str | None]:
    """Returns (times of the shot changes in seconds, None), or ([], reason of the failure).

    Content detection of https://www.scenedetect.com: jumps in mean hue, saturation and brightness.
    """
    import scenedetect  # an optional dependency

    logging.getLogger("pyscenedetect").setLevel(logging.CRITICAL)
    manager = scenedetect.SceneManager()
    manager.add_detector(scenedetect.ContentDetector())
    try:
        manager.detect_scenes(scenedetect.open_video(path, backend="pyav", suppress_output=True))
    except Exception as error:  # its decoder raises many types
        return [], f"shot detection failed: {type(error).__name__}: {error}"
    return [start.seconds for start, _ in manager.get_scene_list()[1:]], None


def require_scenedetect() -> None:
    """Raises InputError if the optional dependency of shot detection is not installed."""
    if importlib.util.find_spec("scenedetect") is None:
        raise InputError("--shots requires scenedetect: run pip install -e '.[shots]'")


def load_frames(
    job: SegmentJob, segments: Sequence[Segment]
) -> Iterator[UInt8[np.ndarray, "F S S 3"]]:
    """Yields the frames of each segment from the job's `frames_file`."""
    with job.frames_file.open("rb") as file:
        for segment in segments:
            shape = (len(segment.times), job.image_size, job.image_size, 3)
            yield np.fromfile(file, np.uint8, count=np.prod(shape)).reshape(shape)


def _cut(
    pictures: Iterable[tuple[float, Picture]],
    image_size: int,
    length: int,
    shot_changes: Sequence[float],
) -> Iterator[tuple[float, int, list[SampledFrame]]]:
    """Yields (start, second of the first frame, frames of each second) of every segment.

    A segment ends at a shot change or after `length` seconds. A remainder of less than half of
    `length` is merged into the previous segment. Only the frames at offsets that are powers of two
    get a thumbnail: one of them is near the middle, whatever the segment's length.
    """
    start, first_second, frames = 0.0, 0, []
    changes = collections.deque(shot_changes)
    for second, (_, picture) in enumerate(pictures):
        change = None
        while changes and changes[0] <= second:
            change = changes.popleft()
        if change is not None and len(frames) >= MIN_SHOT_FRAMES:
            yield start, first_second, frames
            start, first_second, frames = change, second, []
        offset = len(frames) % length
        thumbnail = picture.encode_thumbnail(THUMBNAIL_SIDE) if offset & (offset - 1) == 0 else None
        frames.append((picture.to_square(image_size), thumbnail))
        if 2 * len(frames) >= 3 * length and len(frames) > length:
            yield start, first_second, frames[:length]
            first_second, frames = first_second + length, frames[length:]
            start = float(first_second)
    yield start, first_second, frames


def _middle_thumbnail(frames: Sequence[SampledFrame]) -> bytes:
    """Returns the thumbnail nearest to the middle of a segment."""
    middle = (len(frames) - 1) / 2
    candidates = [(abs(index - middle), jpeg) for index, (_, jpeg) in enumerate(frames) if jpeg]
    return min(candidates, key=lambda candidate: candidate[0])[1]
