"""One's own captions: JSON, JSON lines or CSV."""

import collections
import csv
import dataclasses
import math
from pathlib import Path

from xclip_jax.cli import InputError
from xclip_jax.data.datasets.files import parse_json
from xclip_jax.data.datasets.listing import SPLITS, Clip, Listing, tidy

VARIANTS = ()
DOWNLOAD = "see docs/data.md for the formats"
FIELDS = ("video", "caption", "captions", "start", "end", "split")  # of a file of captions


def read(annotations):
    """One's own captions: JSON (a list of objects), JSON lines or CSV with a header.

    Fields: `video`; `caption` (one) or `captions` (a list; in CSV use several rows); optional
    `start`, `end` in seconds and `split` (train, val or test; without it: train). Rows of the same
    video and segment are put together.

    Raises:
        InputError: naming file, line (or item) and field of the first mistake.
    """
    path = Path(annotations)
    readers = {".json": _json_items, ".jsonl": _jsonl_items, ".csv": _csv_items}
    if path.is_dir():
        raise InputError(f"{path} is a folder; --annotations wants the captions file itself")
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: captions come as {', '.join(readers)}")
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
    except UnicodeDecodeError:
        raise InputError(f"{path}, line {_first_not_utf8(path)}: not UTF-8 text") from None
    if not clips:
        raise InputError(f"{path}: holds no captions")
    return Listing(clips=clips.values())


def _json_items(path):
    items = parse_json(path.read_text(encoding="utf-8-sig"), path)
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
                yield where, parse_json(line.strip(), where)
            except InputError as error:  # which counts the lines of this one line
                raise InputError(str(error).replace(f"{where}, line 1:", f"{where}:")) from None


def _csv_items(path):
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows, header, line = csv.reader(lines, strict=True), None, 1
        try:
            for row in rows:
                # A row may span lines; it is known by its first.
                where, line = f"{path}, line {line}", rows.line_num + 1
                if row and header is None:
                    header = _checked_header(where, row)
                elif row:
                    if len(row) != len(header):
                        fields = ",".join(header)
                        raise InputError(
                            f"{where}: needs one value for each of the fields {fields}"
                        )
                    # An empty optional cell means: not given.
                    cells = zip(header, row, strict=True)
                    yield where, {k: v for k, v in cells if v or k in ("video", "caption")}
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: not valid CSV: {error}") from None


def _checked_header(where, header):
    for name, count in collections.Counter(header).items():
        if count > 1:
            raise InputError(f"{where}: field {name!r} is there {count} times")
        if name not in FIELDS:
            raise InputError(f"{where}: field {name!r}: unknown; known are {', '.join(FIELDS)}")
    return header


def _first_not_utf8(path):
    """Number of the first line that is not UTF-8."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number


def _clip(where, item):
    """Checks one item and makes a Clip of it."""

    def fail(field, what):
        raise InputError(f"{where}: field {field!r}: {what}")

    if not isinstance(item, dict):
        raise InputError(f"{where}: must be an object with 'video' and 'caption' or 'captions'")
    for field in item:
        if field not in FIELDS:
            fail(field, f"unknown; known are {', '.join(FIELDS)}")
    video = item.get("video")
    if not _is_text(video):
        fail("video", "missing or not a file name")
    field = "captions" if "captions" in item else "caption"
    if field == "captions" and "caption" in item:
        fail(field, "there is a 'caption' as well; give one of the two")
    captions = item.get(field)
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions:
        fail(field, "missing or not a sentence or a list of sentences")
    if not all(map(_is_text, captions)):
        fail(field, "holds an empty sentence or something that is not text")
    start, end = (_seconds(item.get(name), name, fail) for name in ("start", "end"))
    if end is not None and end <= (start or 0):
        fail("end", f"{end:g} s is not after the start at {start or 0:g} s")
    split = item.get("split", "train")
    if split not in SPLITS:
        fail("split", f"{split!r} is none of {', '.join(SPLITS)}")
    return Clip(video, tuple(map(tidy, captions)), split, start, end)


def _is_text(value):
    """Whether it is text, not blank, without half a surrogate pair (which JSON may hold)."""
    whole = isinstance(value, str) and value == value.encode(errors="ignore").decode()
    return whole and bool(value.strip())


def _seconds(value, field, fail):
    if value is None:
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        fail(field, f"{value!r} is not a number of seconds")
    if not math.isfinite(seconds) or seconds < 0:
        fail(field, f"{value!r} is not a number of seconds from the start of the video")
    return seconds
