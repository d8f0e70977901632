"""Defines the clips that annotation readers return, and strict readers of file formats."""

import collections
import csv
import dataclasses
import functools
import io
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from xclip_jax.cli import InputError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
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
    """An inconsistency in annotations or files: its kind (see above), the id, details."""

    what: str
    id: str
    detail: str = ""


class Listing:
    """Clips in the order of the annotations, and the inconsistencies found while reading.

    Attributes:
        expected: {split: number of videos in the paper}; empty for custom captions.
        paragraphs: True if all captions of a video are joined into one text.
    """

    def __init__(
        self,
        expected: dict[str, int] | None = None,
        *,
        paragraphs: bool = False,
        clips: Iterable[Clip] = (),
    ) -> None:
        self.expected = expected or {}
        self.paragraphs = paragraphs
        self._notes: list[Finding] = []
        self._lost: dict[str, Finding] = {}
        self._clips = {clip.id: clip for clip in clips}

    @property
    def clips(self) -> list[Clip]:
        """The clips, each with at least one caption."""
        return list(self._clips.values())

    @property
    def lost(self) -> list[Finding]:
        """Findings about ids that cannot become clips, with the split as detail."""
        return list(self._lost.values())

    @property
    def findings(self) -> list[Finding]:
        """All findings, lost ids last."""
        return [*self._notes, *self.lost]

    def note(self, what: str, video: str, detail: str = "") -> None:
        """Records a finding."""
        self._notes.append(Finding(what, video, detail))

    def add(self, split: Split, video: str, captions: Iterable[str]) -> None:
        """Adds a listed video with its captions (or the sentences of its paragraph).

        Captions of a repeated video are added to it. A video listed in two splits is kept in the
        first of test, val, train.
        """
        texts = [normalize_spaces(caption) for caption in captions]
        if "" in texts:
            self.note(BLANK, video, f"{texts.count('')} in {split}")
        texts = [text for text in texts if text]
        if self.paragraphs and texts:
            texts = [" ".join(texts)]
        known = self._clips.get(video)
        if known and known.split != split:
            self.note(TWO_SPLITS, video, f"{known.split} and {split}")
            if SPLITS.index(known.split) > SPLITS.index(split):
                return
            known = None
        if known:
            self.note(REPEATED, video, split)
            texts = [*known.captions, *(text for text in texts if text not in known.captions)]
        if not texts:
            self._lost.setdefault(video, Finding(NO_CAPTIONS, video, split))
            return
        if video in self._lost:
            before = self._lost.pop(video).detail
            if before == split:
                self.note(REPEATED, video, split)
            else:
                self.note(TWO_SPLITS, video, f"{before} and {split}")
        self._clips[video] = Clip(video, tuple(texts), split)

    def counts(self) -> collections.Counter[str]:
        """Returns {split: number of clips}."""
        return collections.Counter(clip.split for clip in self._clips.values())


def normalize_spaces(text: str) -> str:
    """Returns the text on one line, single-spaced, without lone surrogates."""
    return " ".join(text.encode(errors="ignore").decode().split())


class AnnotationFolder:
    """The folder of a benchmark's annotation files.

    Raises:
        InputError: not a folder, or one of `names` is missing; the message includes `download`.
    """

    def __init__(self, path: str | os.PathLike, names: Iterable[str], download: str) -> None:
        self.path = Path(path)
        names = list(names)
        hint = f"it must contain {', '.join(names)}; {download}"
        if not self.path.is_dir():
            problem = "is a file" if self.path.is_file() else "is not a folder"
            raise InputError(f"{path} {problem}: {hint}")
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise InputError(f"{path} has no {', '.join(missing)}: {hint}")

    def json(self, name: str, kind: type) -> tuple[Path, Any]:
        """Returns (path, content) of a JSON file whose top-level value is a `kind`."""
        path = self.path / name
        return path, require_type(parse_json(_read_text(path), path), kind, path)

    def lines(self, name: str) -> list[str]:
        """Returns the non-blank lines of a text file, without line ends."""
        lines = (line.removesuffix("\r") for line in _read_text(self.path / name).split("\n"))
        return [line for line in lines if line.strip()]

    def ids(self, name: str) -> list[str]:
        """Returns the ids in a text file with one id per line."""
        ids = [line.strip() for line in self.lines(name)]
        for number, line in enumerate(ids, 1):
            if len(line.split()) > 1 or line[0] in "{[":
                raise InputError(
                    f"{self.path / name}, line {number}: must be one id, not {line[:60]!r}"
                )
        return ids

    def csv(self, name: str, columns: list[str]) -> list[dict[str, str]]:
        """Returns the rows of a CSV file whose header has these columns."""
        path = self.path / name
        reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
        rows = []
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if not all(isinstance(row.get(column), str) for column in columns):
                    raise InputError(f"{where}: has no {' or '.join(columns)}")
                if None in row:
                    raise InputError(f"{where}: more values than columns; quote text with commas")
                rows.append(row)
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: invalid CSV: {error}") from None
        if not rows:
            raise InputError(f"{path}: no rows below a header with {', '.join(columns)}")
        return rows

    def plain_pickle(self, name: str) -> tuple[Path, Any]:
        """Returns (path, content) of a pickle of plain data, without executing it."""
        path = self.path / name
        try:
            with path.open("rb") as file:
                return path, _PlainUnpickler(file, encoding="utf-8").load()
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # a corrupted pickle may raise any exception
            raise InputError(f"{path}: not a complete pickle ({type(error).__name__})") from None


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler of dicts, lists, strings and numbers that rejects classes and functions."""

    def find_class(self, module_name: str, global_name: str) -> None:
        raise InputError(f"refers to {module_name}.{global_name}: only plain data is read")

    def persistent_load(self, pid: object) -> None:
        raise InputError(f"refers to an object outside of it, {pid!r}: only plain data is read")


def parse_json(text: str, where: object) -> Any:
    """Returns the content of a JSON text or raises InputError for invalid JSON or repeated keys."""
    try:
        return json.loads(text, object_pairs_hook=functools.partial(_unique_keys, where))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}, line {error.lineno}: invalid JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except InputError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{where}: invalid JSON: {error}") from None


def _unique_keys(where: object, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in collections.Counter(name for name, _ in pairs).items():
        if count > 1:
            raise InputError(f"{where}: key {name!r} occurs {count} times in one object")
    return dict(pairs)


def require_type(value: Any, kind: Any, where: object) -> Any:
    """Returns `value` if it is a `kind` (a type or a union of types), else raises InputError."""
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = getattr(kind, "__name__", str(kind))
        raise InputError(f"{where}: must be {expected}, is {type(value).__name__}: wrong file?")
    return value


def require_fields(item: Any, where: object, **kinds: Any) -> list[Any]:
    """Returns the values of a dict's fields if each has its type, else raises InputError."""
    require_type(item, dict, where)
    for name, kind in kinds.items():
        if name not in item:
            raise InputError(f"{where}: has no {name!r}: wrong file?")
        require_type(item[name], kind, f"{where}, {name!r}")
    return [item[name] for name in kinds]


def is_segment(times: Any, last: float) -> bool:
    """Returns True if `times` is [start, end] with 0 <= start <= end <= last."""
    if not isinstance(times, list) or len(times) != 2:
        return False
    numbers = all(isinstance(time, int | float) for time in times)
    return numbers and 0 <= times[0] <= times[1] <= last


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
