"""Reads custom captions from JSON, JSON lines or CSV."""

import collections
import csv
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from xclip_jax.cli import InputError
from xclip_jax.data.annotations import SPLITS, Clip, Listing, normalize_spaces, parse_json

FIELDS = ("video", "caption", "captions", "start", "end", "split")


def read_captions(annotations: str | os.PathLike) -> Listing:
    """Reads captions from JSON (a list of objects), JSON lines or CSV with a header.

    Fields: `video`; `caption` (one) or `captions` (a list; in CSV use several rows); optional
    `start`, `end` in seconds and `split` (train, val or test; default train). Rows of the same
    video and segment are merged.

    Raises:
        InputError: the file is invalid; the message names the line (or item) and field.
    """
    path = Path(annotations)
    readers = {".json": _json_items, ".jsonl": _jsonl_items, ".csv": _csv_items}
    if path.is_dir():
        raise InputError(f"{path} is a folder; --annotations must be the captions file itself")
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: captions must be a {', '.join(readers)} file")
    clips: dict[str, Clip] = {}
    try:
        for where, item in readers[path.suffix.lower()](path):
            clip = _parse_clip(where, item)
            known = clips.setdefault(clip.id, clip)
            if known is not clip:
                if known.split != clip.split:
                    raise InputError(
                        f"{where}: field 'split': {clip.id} is in {clip.split} and {known.split}"
                    )
                clips[clip.id] = dataclasses.replace(known, captions=known.captions + clip.captions)
    except UnicodeDecodeError:
        raise InputError(f"{path}, line {_first_invalid_line(path)}: not UTF-8 text") from None
    if not clips:
        raise InputError(f"{path}: contains no captions")
    return Listing(clips=clips.values())


def _json_items(path: Path) -> Iterator[tuple[str, Any]]:
    items = parse_json(path.read_text(encoding="utf-8-sig"), path)
    if not isinstance(items, list):
        raise InputError(f"{path}: must be a list of objects with 'video' and 'caption'")
    for number, item in enumerate(items, 1):
        yield f"{path}, item {number}", item


def _jsonl_items(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, parse_json(line.strip(), where)
            except InputError as error:  # drop the line number within this one line
                raise InputError(str(error).replace(f"{where}, line 1:", f"{where}:")) from None


def _csv_items(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows, header, line = csv.reader(lines, strict=True), None, 1
        try:
            for row in rows:
                # A row may span lines; errors name its first.
                where, line = f"{path}, line {line}", rows.line_num + 1
                if not row:
                    continue
                if header is None:
                    header = _check_header(where, row)
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{where}: {len(row)} values for the {len(header)} fields "
                        f"{','.join(header)}"
                    )
                cells = zip(header, row, strict=True)  # an empty optional cell is an absent field
                yield where, {k: v for k, v in cells if v or k in ("video", "caption")}
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: invalid CSV: {error}") from None


def _check_header(where: str, header: list[str]) -> list[str]:
    for name, count in collections.Counter(header).items():
        if count > 1:
            raise InputError(f"{where}: field {name!r} occurs {count} times")
        _check_field(where, name)
    return header


def _check_field(where: str, name: str) -> None:
    if name not in FIELDS:
        raise InputError(f"{where}: field {name!r}: unknown; must be one of {', '.join(FIELDS)}")


def _first_invalid_line(path: Path) -> int:
    """Returns the number of the first line that is not UTF-8."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 1


def _parse_clip(where: str, item: Any) -> Clip:
    """Validates one item and converts it to a Clip."""

    def error(field: str, problem: str) -> InputError:
        return InputError(f"{where}: field {field!r}: {problem}")

    if not isinstance(item, dict):
        raise InputError(f"{where}: must be an object with 'video' and 'caption' or 'captions'")
    for name in item:
        _check_field(where, name)
    video = item.get("video")
    if not _is_text(video):
        raise error("video", "missing or not a file name")
    field = "captions" if "captions" in item else "caption"
    if field == "captions" and "caption" in item:
        raise error(field, "there is a 'caption' as well; use only one of the two")
    captions = item.get(field)
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions:
        raise error(field, "missing or not a sentence or a list of sentences")
    if not all(map(_is_text, captions)):
        raise error(field, "contains an empty sentence or a value that is not text")
    times: dict[str, float | None] = {}
    for field in ("start", "end"):
        times[field] = seconds = _parse_seconds(item.get(field))
        if seconds is not None and not 0 <= seconds < math.inf:
            raise error(field, f"{item[field]!r} is not a number of seconds, at least 0")
    start, end = times["start"], times["end"]
    if end is not None and end <= (start or 0):
        raise error("end", f"{end:g} s is not after the start at {start or 0:g} s")
    split = item.get("split", "train")
    if split not in SPLITS:
        raise error("split", f"{split!r} must be one of {', '.join(SPLITS)}")
    return Clip(video, tuple(map(normalize_spaces, captions)), split, start, end)


def _is_text(value: object) -> TypeGuard[str]:
    """Returns True for text that is not blank and has no lone surrogate (JSON may contain one)."""
    if not isinstance(value, str) or value != value.encode(errors="ignore").decode():
        return False
    return bool(value.strip())


def _parse_seconds(value: Any) -> float | None:
    """Returns the number, None for None, or nan for a value that is not a number."""
    if value is None:
        return None
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
