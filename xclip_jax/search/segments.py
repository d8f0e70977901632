"""Video file -> segments with their frames; run in worker processes, a file at a time."""

import dataclasses
from pathlib import Path

import numpy as np

from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.video import VideoError, VideoReader

THUMBNAIL = 320  # pixels of its longer side


@dataclasses.dataclass(frozen=True)
class Job:
    """A file to cut.

    Attributes:
        frames: file to leave the frames in.
        image_size, max_frames: of the model.
        seconds: length of a segment, whole.
    """

    path: str
    frames: Path
    image_size: int
    max_frames: int
    seconds: int


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
    reader, found = VideoReader(job.path), []
    try:
        with job.frames.open("wb") as file:
            for start, pictures in _cut(reader, job.image_size, job.seconds):
                chosen = choose_frames(len(pictures), job.max_frames)
                for index in chosen:
                    pictures[index][0].tofile(file)
                times = [float(start + index) for index in chosen]
                found.append((float(start), times, _middle_thumbnail(pictures)))
    except (VideoError, OSError) as error:
        return Reading([], failure=str(error))
    ends = [start for start, *_ in found[1:]] + [reader.end]
    segments = [
        Segment(start, end, times, thumbnail)
        for (start, times, thumbnail), end in zip(found, ends, strict=True)
    ]
    return Reading(segments, note=reader.note)


def frames_of(job, segments):
    """Of each segment of a Reading its frames, n x S x S x 3 uint8, read one after another."""
    side = job.image_size
    with job.frames.open("rb") as file:
        for segment in segments:
            shape = (len(segment.times), side, side, 3)
            yield np.fromfile(file, np.uint8, count=np.prod(shape)).reshape(shape)


def _cut(reader, image_size, length):
    """Yields (first second, [(frame, thumbnail or None) of each second]) of every segment.

    All have `length` seconds but the last: a rest of less than half joins the one before. Few
    seconds get thumbnails, but some near the middle, however long the segment turns out to be.
    """
    start, pending = 0, []
    for second, (_, picture) in enumerate(reader):
        offset = second % length
        thumbnail = picture.thumbnail(THUMBNAIL) if offset & (offset - 1) == 0 else None
        pending.append((picture.square(image_size), thumbnail))
        if 2 * len(pending) >= 3 * length and len(pending) > length:
            yield start, pending[:length]
            start, pending = start + length, pending[length:]
    yield start, pending


def _middle_thumbnail(pictures):
    """The thumbnail nearest to the middle."""
    middle = (len(pictures) - 1) / 2
    there = [index for index, (_, thumbnail) in enumerate(pictures) if thumbnail]
    return pictures[min(there, key=lambda index: abs(index - middle))][1]
