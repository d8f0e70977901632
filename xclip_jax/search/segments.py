"""Video file -> segments with their frames; run in worker processes, a file at a time."""

import collections
import dataclasses
import importlib.util
import logging
from pathlib import Path

import av
import numpy as np

from xclip_jax.cli import InputError
from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.video import VideoError, VideoReader

THUMBNAIL = 320  # pixels of its longer side
SHORTEST_SHOT = 2  # frames; a shorter one stays with the one before


@dataclasses.dataclass(frozen=True)
class Job:
    """A file to cut.

    Attributes:
        frames: file to leave the frames in.
        image_size, max_frames: of the model.
        seconds: length of a segment, whole.
        shots: whether to cut at changes of shot as well.
    """

    path: str
    frames: Path
    image_size: int
    max_frames: int
    seconds: int
    shots: bool = False


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a video.

    Attributes:
        start, end: seconds after the file's first frame.
        times: of its n frames, n <= max_frames, likewise.
        thumbnail: JPEG of about its middle.
    """

    start: float
    end: float
    times: list[float]
    thumbnail: bytes


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a file gave.

    Attributes:
        segments: in order; their frames lie one after another in the job's file, uint8 S x S x 3.
        failure: why there are none, or None.
        note: why the file was read only in part, or None.
    """

    segments: list[Segment]
    failure: str | None = None
    note: str | None = None


def read_segments(job):
    """The Reading of a job; one frame a second, thinned out uniformly to max_frames a segment."""
    av.logging.set_level(None)  # what is wrong with a file is told in our own words
    reader, found = VideoReader(job.path), []
    try:
        changes, trouble = shot_changes(job.path) if job.shots else ([], None)
        with job.frames.open("wb") as file:
            for start, first, pictures in _cut(reader, job.image_size, job.seconds, changes):
                chosen = choose_frames(len(pictures), job.max_frames)
                for index in chosen:
                    pictures[index][0].tofile(file)
                times = [float(first + index) for index in chosen]
                found.append((start, times, _middle_thumbnail(pictures)))
    except VideoError as error:
        return Reading([], failure=str(error))
    ends = [start for start, *_ in found[1:]] + [reader.end]
    segments = [
        Segment(start, end, times, thumbnail)
        for (start, times, thumbnail), end in zip(found, ends, strict=True)
    ]
    return Reading(segments, note=reader.note or trouble)


def shot_changes(path):
    """(times of the changes of shot in seconds, None); or ([], why they are not known).

    https://www.scenedetect.com: jumps of the mean hue, saturation and brightness.
    """
    import scenedetect  # an extra that few need

    logging.getLogger("pyscenedetect").setLevel(logging.CRITICAL)
    manager = scenedetect.SceneManager()
    manager.add_detector(scenedetect.ContentDetector())
    try:
        manager.detect_scenes(scenedetect.open_video(path, backend="pyav", suppress_output=True))
    except Exception as error:  # whatever its decoder stumbles over
        return [], f"shots not found: {str(error).splitlines()[0] or type(error).__name__}"
    return [start.seconds for start, _ in manager.get_scene_list()[1:]], None


def check_shots():
    """Raises InputError if what finds shots is not installed."""
    if importlib.util.find_spec("scenedetect") is None:
        raise InputError("--shots: pip install -e '.[shots]' first")


def frames_of(job, segments):
    """Of each segment of a Reading its frames, n x S x S x 3 uint8, read one after another."""
    side = job.image_size
    with job.frames.open("rb") as file:
        for segment in segments:
            shape = (len(segment.times), side, side, 3)
            yield np.fromfile(file, np.uint8, count=np.prod(shape)).reshape(shape)


def _cut(reader, image_size, length, changes):
    """Yields (start, first second, [(frame, thumbnail or None) of each second]) of every segment.

    A segment ends at a change of shot, or after `length` seconds; a rest of less than half joins
    the one before. Few seconds get thumbnails, some of them near the middle of whatever length.
    """
    start, first, pending, changes = 0.0, 0, [], collections.deque(changes)
    for second, (_, picture) in enumerate(reader):
        change = None
        while changes and changes[0] <= second:
            change = changes.popleft()
        if change is not None and len(pending) >= SHORTEST_SHOT:
            yield start, first, pending
            start, first, pending = change, second, []
        offset = len(pending) % length
        thumbnail = picture.thumbnail(THUMBNAIL) if offset & (offset - 1) == 0 else None
        pending.append((picture.square(image_size), thumbnail))
        if 2 * len(pending) >= 3 * length and len(pending) > length:
            yield start, first, pending[:length]
            first, pending = first + length, pending[length:]
            start = float(first)
    yield start, first, pending


def _middle_thumbnail(pictures):
    """The thumbnail nearest to the middle."""
    middle = (len(pictures) - 1) / 2
    there = [index for index, (_, thumbnail) in enumerate(pictures) if thumbnail]
    return pictures[min(there, key=lambda index: abs(index - middle))][1]
