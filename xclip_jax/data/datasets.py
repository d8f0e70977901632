"""Annotation readers: released or own files -> one list of clips.

A reader is one function `(annotations: Path) -> list[Clip]`, strict about what it is given; finding
the files, reading frames and writing the data set are the same for all and live elsewhere.
"""

import csv
import dataclasses
import json
import math
from pathlib import Path

from xclip_jax.data.builder import SPLITS
from xclip_jax.data.video import VIDEO_SUFFIXES
from xclip_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video, or the part of it from `start` to `end` seconds, with its captions.

    `video` is a file's path below the videos' folder, or its id: the path or name without suffix.
    """

    video: str
    captions: tuple[str, ...]
    split: str = "train"
    start: float | None = None
    end: float | None = None

    @property
    def id(self):
        """The video, with the segment if it is one; unique in a data set."""
        if self.start is None and self.end is None:
            return self.video
        return f"{self.video}[{self.start or 0:g}-{'' if self.end is None else f'{self.end:g}'}]"


def read_captions(annotations):
    """One's own captions: JSON (a list of objects), JSON lines or CSV with a header.

    Fields: `video`; `caption` (one) or `captions` (a list; in CSV use several rows); optional
    `start`, `end` in seconds and `split` (train, val or test; without it: train). Rows of the same
    video and segment are put together.

    Raises:
        InputError: naming file, line (or item) and field of the first mistake.
    """
    path = Path(annotations)
    readers = {".json": _json_items, ".jsonl": _jsonl_items, ".csv": _csv_items}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: captions come as {', '.join(readers)}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; --annotations wants the captions file itself")
    clips = {}
    try:
        for where, item in readers[path.suffix.lower()](path):
            clip = _clip(where, item)
            known = clips.setdefault(clip.id, clip)
            if known is not clip:
                if known.split != clip.split:
                    raise InputError(
                        f"{where}: field 'split': {clip.id} is in {clip.split} and {known.split}"
                    )
                clips[clip.id] = dataclasses.replace(known, captions=known.captions + clip.captions)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file ({error})") from None
    if not clips:
        raise InputError(f"{path}: holds no captions")
    return list(clips.values())


READERS = {"captions": read_captions}


def find_videos(folder):
    """Every video file below a folder, by each name an annotation may use.

    Returns:
        {name: [Path, ...]} where a name is a path below the folder or a file name, each with and
        without its last suffix.

    Raises:
        InputError: the folder is missing or holds no video.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no such folder of videos: {folder}")
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            below = path.relative_to(folder)
            names = {below.as_posix(), below.with_suffix("").as_posix(), path.name, path.stem}
            for name in names:
                found.setdefault(name, []).append(path)
    if not found:
        raise InputError(f"no video files in {folder}")
    return found


def locate(video, found):
    """The one file that an annotation's `video` means, out of `find_videos`; None if there is none.

    Raises:
        InputError: several files answer to the name; the message names them.
    """
    paths = found.get(video, [])
    if len(paths) > 1:
        raise InputError(f"video {video!r} is ambiguous: {' and '.join(map(str, paths[:3]))}")
    return paths[0] if paths else None


def _json_items(path):
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(items, list):
        raise InputError(f"{path}: must be a list of objects with 'video' and 'caption'")
    for number, item in enumerate(items, 1):
        yield f"{path}, item {number}", item


def _jsonl_items(path):
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: not valid JSON: {error.msg}") from None


def _csv_items(path):
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    header = ",".join(reader.fieldnames)
                    raise InputError(f"{where}: needs one value for each of the fields {header}")
                # An empty optional cell means: not given.
                yield where, {k: v for k, v in row.items() if v or k in ("video", "caption")}
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None


def _clip(where, item):
    """Checks one item and makes a Clip of it."""

    def fail(field, what):
        raise InputError(f"{where}: field {field!r}: {what}")

    if not isinstance(item, dict):
        raise InputError(f"{where}: must be an object with 'video' and 'caption' or 'captions'")
    known = ("video", "caption", "captions", "start", "end", "split")
    for field in item:
        if field not in known:
            fail(field, f"unknown; known are {', '.join(known)}")
    video = item.get("video")
    if not isinstance(video, str) or not video.strip():
        fail("video", "missing or not a file name")
    field = "captions" if "captions" in item else "caption"
    captions = item.get(field)
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions:
        fail(field, "missing or not a sentence or a list of sentences")
    if not all(isinstance(caption, str) and caption.strip() for caption in captions):
        fail(field, "holds an empty sentence or something that is not text")
    start, end = (_seconds(item.get(name), name, fail) for name in ("start", "end"))
    if end is not None and end <= (start or 0):
        fail("end", f"{end:g} s is not after the start at {start or 0:g} s")
    split = item.get("split", "train")
    if split not in SPLITS:
        fail("split", f"{split!r} is none of {', '.join(SPLITS)}")
    return Clip(video, tuple(" ".join(c.split()) for c in captions), split, start, end)


def _seconds(value, field, fail):
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        fail(field, f"{value!r} is not a number of seconds")
    if not math.isfinite(seconds) or seconds < 0:
        fail(field, f"{value!r} is not a number of seconds from the start of the video")
    return seconds
