"""Reads annotation files strictly, collects their clips, and reads custom captions."""

import collections
import csv
import dataclasses
import io
import json
import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from xclip_jax.cli import InputError, PathLike, check_file, first_line
from xclip_jax.data.tokenizer import is_blank

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
FIELDS = ("video", "caption", "captions", "start", "end", "split")  # of custom captions
# Kinds of findings.
NO_CAPTIONS = "id without captions"  # the id is in a split's list and cannot become a clip
UNLISTED = "captions of an id in no list"
REPEATED = "repeated id"
TWO_SPLITS = "id in two splits"
BLANK = "empty caption"
SEGMENT = "invalid segment"


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video, or its part from `start` to `end` seconds, with captions.

    `video` is a file's path in the folder of videos, or an id: the path or name without suffix.
    """

    video: str
    captions: tuple[str, ...]
    split: Split = "train"
    start: float | None = None
    end: float | None = None

    @property
    def id(self) -> str:
        """Unique id in a data set: the video, followed by its segment if there is one."""
        if not self.start and self.end is None:
            return self.video
        # Full precision: two segments an hour into a video may differ by milliseconds.
        start, end = (repr(s or 0).removesuffix(".0") for s in (self.start, self.end))
        return f"{self.video}[{start}-{'' if self.end is None else end}]"


@dataclasses.dataclass(frozen=True)
class Finding:
    """An inconsistency in annotations or files."""

    what: str  # its kind, see above
    id: str
    detail: str = ""


@dataclasses.dataclass
class Listing:
    """Clips in the order of the annotations, and the inconsistencies found while reading.

    `expected` is {split: number of videos in the paper}, empty for custom captions. With
    `paragraphs`, all captions of a video are joined into one text. Each clip has at least one
    caption. `lost` has a finding for each id that cannot become a clip, with the split as detail.
    """

    expected: dict[str, int] = dataclasses.field(default_factory=dict)
    paragraphs: bool = False
    clips_by_id: dict[str, Clip] = dataclasses.field(default_factory=dict)
    lost: dict[str, Finding] = dataclasses.field(default_factory=dict)
    notes: list[Finding] = dataclasses.field(default_factory=list)  # all other findings

    @property
    def clips(self) -> list[Clip]:
        """The clips in order."""
        return list(self.clips_by_id.values())

    @property
    def findings(self) -> list[Finding]:
        """All findings, lost ids last."""
        return [*self.notes, *self.lost.values()]

    def counts(self) -> collections.Counter[str]:
        """Returns {split: number of clips}."""
        return collections.Counter(clip.split for clip in self.clips)

    def note(self, what: str, video: str, detail: str = "") -> None:
        """Records a finding."""
        self.notes.append(Finding(what, video, detail))

    def add(self, split: Split, video: str, captions: Iterable[str]) -> None:
        """Adds a listed video with its captions (or the sentences of its paragraph).

        Captions of a repeated video are added to it. A video listed in two splits is kept in the
        first of test, val, train.
        """
        texts = [normalize_spaces(caption) for caption in captions]
        if blank := sum(map(is_blank, texts)):
            self.note(BLANK, video, f"{blank} in {split}")
        texts = [text for text in texts if not is_blank(text)]
        if self.paragraphs and texts:
            texts = [" ".join(texts)]
        known = self.clips_by_id.get(video)
        if known and known.split != split:
            self.note(TWO_SPLITS, video, f"{known.split} and {split}")
            if SPLITS.index(known.split) > SPLITS.index(split):
                return
        elif known:
            self.note(REPEATED, video, split)
            texts = [*known.captions, *(text for text in texts if text not in known.captions)]
        if not texts:
            self.lost.setdefault(video, Finding(NO_CAPTIONS, video, split))
            return
        if before := self.lost.pop(video, None):
            what = REPEATED if before.detail == split else TWO_SPLITS
            self.note(what, video, split if what == REPEATED else f"{before.detail} and {split}")
        self.clips_by_id[video] = Clip(video, tuple(texts), split)


def normalize_spaces(text: str) -> str:
    """Returns the text on one line, single-spaced, without lone surrogates."""
    return " ".join(text.encode(errors="ignore").decode().split())


class AnnotationFolder:
    """The folder of a benchmark's annotation files `names`, which errors list with `download`."""

    def __init__(self, path: PathLike, names: Iterable[str], download: str) -> None:
        self.path = Path(path)
        names = list(names)
        missing = [name for name in names if not (self.path / name).is_file()]
        problem = f"has no {', '.join(missing)}"
        if not self.path.is_dir():
            problem = "is a file" if self.path.is_file() else "is not a folder"
        if missing:
            raise InputError(f"{path} {problem}: it must contain {', '.join(names)}; {download}")

    def json(self, name: str, kind: type) -> tuple[Path, Any]:
        """Returns (path, content) of a JSON file whose top-level value is a `kind`."""
        path = self.path / name
        return path, require_type(_parse_json(read_text(path), path), kind, path)

    def lines(self, name: str) -> list[str]:
        """Returns the non-blank lines of a text file, without line ends."""
        return [line for line in read_text(self.path / name).split("\n") if line.strip()]

    def ids(self, name: str) -> list[str]:
        """Returns the ids in a text file with one id per line."""
        ids = [line.strip() for line in self.lines(name)]
        for number, line in enumerate(ids, 1):
            if len(line.split()) > 1 or line[0] in "{[":
                where = f"{self.path / name}, line {number}"
                raise InputError(f"{where}: must be one id, not {line[:60]!r}")
        return ids

    def csv(self, name: str, columns: list[str]) -> list[dict[str, str]]:
        """Returns the rows of a CSV file whose header has these columns."""
        path = self.path / name
        (_, header), *rows = list(_read_csv(path)) or [("", [])]
        for where, cells in rows:
            if not set(columns) <= set(header[: len(cells)]):
                raise InputError(f"{where}: has no {' or '.join(columns)}")
            if len(cells) > len(header):
                raise InputError(f"{where}: more values than columns; quote text with commas")
        if not rows:
            raise InputError(f"{path}: no rows below a header with {', '.join(columns)}")
        return [dict(zip(header, cells, strict=False)) for _, cells in rows]

    def plain_pickle(self, name: str) -> tuple[Path, Any]:
        """Returns (path, content) of a pickle of plain data, without executing it."""
        path = self.path / name
        check_file(path)
        try:
            with path.open("rb") as file:
                return path, _PlainUnpickler(file, encoding="utf-8").load()
        except Exception as error:  # a corrupted pickle may raise any exception
            problem = f"not a complete pickle of plain data ({first_line(error)})"
            raise InputError(f"{path}: {problem}") from None


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler of dicts, lists, strings and numbers that rejects classes and functions."""

    def find_class(self, module_name: str, global_name: str) -> None:
        raise ValueError(f"refers to {module_name}.{global_name}")


def require_type(value: Any, kind: Any, where: object) -> Any:
    """Returns `value` if it is a `kind` (a type or a union of types), else raises InputError."""
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = getattr(kind, "__name__", str(kind))
        raise InputError(f"{where}: must be {expected}, is {type(value).__name__}; wrong file")
    return value


def require_fields(item: Any, where: object, **kinds: Any) -> list[Any]:
    """Returns the values of a dict's fields if each has its type, else raises InputError."""
    require_type(item, dict, where)
    for name, kind in kinds.items():
        if name not in item:
            raise InputError(f"{where}: has no {name!r}; wrong file")
        require_type(item[name], kind, f"{where}, {name!r}")
    return [item[name] for name in kinds]


def read_text(path: Path) -> str:
    """Returns the content of a UTF-8 file, with or without byte order mark."""
    check_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text") from None


def _parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """Parses a JSON file, or one line of it, and rejects repeated keys."""

    def make_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in collections.Counter(name for name, _ in pairs).items():
            if count > 1:
                raise ValueError(f"key {name!r} occurs {count} times in one object")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=make_dict)
    except json.JSONDecodeError as error:
        line, problem = line or error.lineno, f"invalid JSON: {error.msg}"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:  # from make_dict, or a number of thousands of digits
        problem = f"invalid JSON: {error}"
    raise InputError(f"{path}, line {line}: {problem}" if line else f"{path}: {problem}")


def _read_csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (place, cells) of each non-blank row, where the place names its first line."""
    rows, line = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), 1
    try:
        for row in rows:
            where, line = f"{path}, line {line}", rows.line_num + 1
            if row:
                yield where, row
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: invalid CSV: {error}") from None


def read_captions(annotations: PathLike) -> Listing:
    """Reads custom captions from JSON (a list of objects), JSON lines or CSV with a header.

    Fields: `video`; `caption` (one) or `captions` (a list; in CSV use several rows); optional
    `start`, `end` in seconds and `split` (train, val or test; default train). Rows of the same
    video and segment are merged. An InputError names the line (or item) and field.
    """
    path = Path(annotations)
    if path.is_dir():
        raise InputError(f"{path} is a folder; --annotations must be the captions file itself")
    clips: dict[str, Clip] = {}
    for where, item in _read_items(path):
        if not isinstance(item, dict):
            raise InputError(f"{where}: must be an object with 'video' and 'caption' or 'captions'")
        clip = _parse_clip(where, item)
        known = clips.setdefault(clip.id, clip)
        if known.split != clip.split:
            splits = f"{clip.split} and {known.split}"
            raise InputError(f"{where}: field 'split': {clip.id} is in {splits}")
        if known is not clip:
            clips[clip.id] = dataclasses.replace(known, captions=known.captions + clip.captions)
    if not clips:
        raise InputError(f"{path}: contains no captions")
    return Listing(clips_by_id=clips)


def _read_items(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, item) for each item of a captions file."""
    match path.suffix.lower():
        case ".json":
            items = _parse_json(read_text(path), path)
            if not isinstance(items, list):
                raise InputError(f"{path}: must be a list of objects with 'video' and 'caption'")
            for number, item in enumerate(items, 1):
                yield f"{path}, item {number}", item
        case ".jsonl":
            for number, line in enumerate(read_text(path).split("\n"), 1):
                if line.strip():
                    yield f"{path}, line {number}", _parse_json(line.strip(), path, number)
        case ".csv":
            rows = _read_csv(path)
            where, header = next(rows, ("", []))
            _check_fields(where, header)
            for where, row in rows:
                if len(row) != len(header):
                    fields = f"the {len(header)} fields {','.join(header)}"
                    raise InputError(f"{where}: {len(row)} values for {fields}")
                cells = zip(header, row, strict=True)  # an empty optional cell is an absent field
                yield where, {k: v for k, v in cells if v or k in ("video", "caption")}
        case _:
            raise InputError(f"{path}: captions must be a .json, .jsonl, .csv file")


def _check_fields(where: str, names: Iterable[str]) -> None:
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise InputError(f"{where}: field {name!r} occurs {count} times")
        if name not in FIELDS:
            allowed = ", ".join(FIELDS)
            raise InputError(f"{where}: field {name!r}: unknown; must be one of {allowed}")


def _parse_clip(where: str, item: Any) -> Clip:
    def check(valid: bool, field: str, problem: str) -> None:
        if not valid:
            raise InputError(f"{where}: field {field!r}: {problem}")

    _check_fields(where, list(item))
    video, split = item.get("video"), item.get("split", "train")
    check(_is_text(video), "video", "missing or not a file name")
    both = item.keys() >= {"caption", "captions"}
    check(not both, "captions", "there is a 'caption' as well; use only one of the two")
    field = "captions" if "captions" in item else "caption"
    captions = [item[field]] if isinstance(item.get(field), str) else item.get(field)
    is_list = isinstance(captions, list) and bool(captions)
    check(is_list, field, "missing or not a sentence or a list of sentences")
    is_text = all(map(_is_text, captions))
    check(is_text, field, "contains an empty sentence or a value that is not text")
    times = [item.get("start"), item.get("end")]
    for field, time in zip(("start", "end"), times, strict=True):
        problem = f"{time!r} must be a number of seconds, at least 0"
        check(time is None or _is_seconds(time), field, problem)
    start, end = (None if time is None else float(time) for time in times)
    if end is not None and end <= (start or 0):
        check(False, "end", f"{end:g} s is not after the start at {start or 0:g} s")
    check(split in SPLITS, "split", f"{split!r} must be one of {', '.join(SPLITS)}")
    return Clip(video, tuple(map(normalize_spaces, captions)), split, start, end)


def _is_text(value: Any) -> bool:
    """Returns True for text that is not blank and has no lone surrogate (JSON may contain one)."""
    is_text = isinstance(value, str) and value == value.encode(errors="ignore").decode()
    return is_text and not is_blank(value)


def _is_seconds(value: Any) -> bool:
    """Returns True for a finite number of at least 0, which CSV stores as text."""
    try:
        return not isinstance(value, bool) and 0 <= float(value) < math.inf
    except (TypeError, ValueError, OverflowError):
        return False


def read_queries(path: Path, videos: Sequence[str]) -> tuple[list[str], Bool[np.ndarray, "Q V"]]:
    """Reads JSON lines of queries, each with all its right videos: {"text": ..., "videos": [...]}.

    Returns (texts, True where a video of the gallery `videos` is right). An InputError names the
    line.
    """
    texts, index = [], {video: number for number, video in enumerate(videos)}
    rows = []
    for where, item in _read_items(path):
        text, right = require_fields(item, where, text=str, videos=list)
        for video in right:
            if require_type(video, str, where) not in index:
                gallery = f"{len(videos):,} evaluated videos"
                raise InputError(f"{where}: video {video!r}: must be one of the {gallery}")
        if is_blank(text) or not right:
            raise InputError(f"{where}: must have a sentence and at least one video")
        texts.append(text)
        rows.append(np.isin(np.arange(len(videos)), [index[video] for video in right]))
    if not texts:
        raise InputError(f"{path}: contains no queries")
    return texts, np.stack(rows)
