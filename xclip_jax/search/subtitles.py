"""Reads subtitles: from files beside a film and from the text streams inside it.

Sidecar files are parsed by https://pysubs2.readthedocs.io, streams by FFmpeg. Subtitles that are
pictures (DVD, Blu-ray) are not read.
"""

import codecs
import collections
import html
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pysubs2
from av.error import FFmpegError
from pysubs2.exceptions import Pysubs2Error

from xclip_jax.cli import PathLike, explain_no_file, list_some
from xclip_jax.data.container import Film, find_first_frame, open_film, reason
from xclip_jax.data.extraction import VIDEO_SUFFIXES
from xclip_jax.search.lines import MAX_LINES, Line, fill_lengths, make_line, sort_lines

SUFFIXES = (".srt", ".vtt", ".ass", ".ssa")
MAX_FILES = 16  # beside a film
MAX_BYTES = 2**24  # of a file; a film has about 100 kB, with typeset signs up to 10 MB
_TEXT_CODECS = ("ass", "mov_text", "srt", "ssa", "subrip", "text", "webvtt")
_LANGUAGE = re.compile(r"[a-z0-9]{1,12}(?:[-_][a-z0-9]{1,8})*", re.IGNORECASE)
_MAX_PARTS = 3  # of a file's name after the film's, such as .pt-BR.forced
_MAX_CUE_LINES = 20
_MAX_CUE_CHARACTERS = 10_000
# Each matches in linear time: no repeated part can match the start of another match.
_TAG = re.compile(r"<(?:/?[A-Za-z]|\d)[^<>]*>")  # of HTML and WebVTT
_OVERRIDE = re.compile(r"\{[^{}]*\}")  # of ASS
_DRAWING = re.compile(r"\{[^{}]*\\p[1-9][^{}]*\}")  # of ASS: what follows are coordinates
_BREAK = re.compile(r"\\[Nnh]")  # of ASS: line breaks and hard spaces


class Subtitles(NamedTuple):
    """The subtitles of a film, and why some of them could not be read."""

    lines: list[Line]  # of all languages, sorted by time
    problems: list[str]


class _Folder:
    """The subtitle files of a folder, by the names of the films to which they may belong.

    Names are compared in Unicode's form NFC: some systems write others. Only files whose names
    start with `prefix` are read.
    """

    def __init__(self, path: str, prefix: str = "") -> None:
        try:
            entries = os.listdir(path)
        except OSError:
            entries = []
        self.path, self._films = path, set[str]()  # names of films without their suffixes
        self._files = collections.defaultdict[str, list[tuple[str, str]]](list)
        for entry in entries:
            name = unicodedata.normalize("NFC", entry)
            if not name.startswith(prefix):
                continue
            own, suffix = os.path.splitext(name)
            suffix = suffix.lower()
            if suffix in VIDEO_SUFFIXES:
                self._films.add(own)
            elif suffix in SUFFIXES:
                for name in _strip_languages(own):
                    self._files[name].append((own, entry))

    def find(self, film: str) -> list[str]:
        """Returns the paths of the files of a film, see `find_sidecars`."""
        name, stem = _normalize(film)
        found = {entry: own for own, entry in self._files.get(name, ())}
        files = self._files.get(stem, ())
        found |= {entry: own for own, entry in files if not own.startswith(name)}
        own_files = [entry for entry, own in found.items() if not self._has_longer(stem, own)]
        return [os.path.join(self.path, entry) for entry in sorted(own_files)[:MAX_FILES]]

    def _has_longer(self, stem: str, own: str) -> bool:
        """Returns True if there is a film whose name is a longer part of the file's."""
        parts = own[len(stem) :].split(".")
        longer = (stem + ".".join(parts[:count]) for count in range(2, len(parts) + 1))
        return not self._films.isdisjoint(longer)


def _normalize(film: str) -> tuple[str, str]:
    """Returns the name of a film, with and without its suffix, in Unicode's form NFC."""
    name = unicodedata.normalize("NFC", film)
    return name, os.path.splitext(name)[0]


def _strip_languages(name: str) -> Iterator[str]:
    """Yields a name, and it without its last one to _MAX_PARTS parts if they may be languages."""
    yield name
    for _ in range(_MAX_PARTS):
        name, dot, part = name.rpartition(".")
        if not dot or not _LANGUAGE.fullmatch(part):
            return
        yield name


def find_all_sidecars(paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns {path of a film: the sorted paths of the subtitle files beside it}.

    See `find_sidecars`. It lists each folder once.
    """
    folders: dict[str, _Folder] = {}
    found = {}
    for path in paths:
        folder, name = os.path.split(os.path.abspath(path))
        if folder not in folders:
            folders[folder] = _Folder(folder)
        found[path] = folders[folder].find(name)
    return found


def find_sidecars(path: PathLike) -> list[str]:
    """Returns the sorted paths of the subtitle files beside a film.

    Those of film.mp4 are film.srt, film.en.srt, film.pt-BR.forced.srt, film.mp4.srt and the same
    with other `SUFFIXES`, in upper or lower case, at most MAX_FILES. film.part.srt belongs to
    film.part.mp4 if there is one. For many films, `find_all_sidecars` is faster.
    """
    folder, name = os.path.split(os.path.abspath(path))
    return _Folder(folder, _normalize(name)[1]).find(name)


def read_subtitles(path: PathLike, sidecars: Sequence[str] | None = None) -> Subtitles:
    """Reads the subtitles beside a film and inside it, of all languages, identical lines once.

    `sidecars` are the files beside it, if they are known. Lines, bytes and files are limited, see
    the constants. Raises VideoError if the film cannot be
    opened or no frame of it can be decoded.
    """
    first, lines, problems = find_first_frame(path), [], []
    for sidecar in find_sidecars(path) if sidecars is None else sidecars:
        try:
            added, problem = _parse(_read_text(sidecar), os.path.splitext(sidecar)[1].lower())
        except (OSError, ValueError) as error:
            added, problem = [], reason(error)
        lines += fill_lengths(_shift(line, first.offset) for line in added)
        problems += [f"{os.path.basename(sidecar)}: {problem}"] if problem else []
    with open_film(path) as film:
        added, problem = _read_streams(film, first.stamp)
        lines += added
        problems += [problem] if problem else []
    lines = sort_lines(lines)
    if len(lines) > MAX_LINES:
        problems.append(f"only the first {MAX_LINES:,} of {len(lines):,} lines are used")
    return Subtitles(lines[:MAX_LINES], [list_some([problem]) for problem in problems])


def has_text_streams(path: PathLike) -> bool:
    """Returns True if a film has subtitles as text inside it.

    Raises VideoError if it cannot be opened.
    """
    with open_film(path) as film:
        return any(map(_has_text, film.container.streams.subtitles))


def _shift(line: Line, zero: float) -> Line:
    """Returns a line with times after `zero`, which has the time 0."""
    return Line(max(line.start - zero, 0.0), max(line.end - zero, 0.0), line.text)


def _read_text(path: str) -> str:
    """Returns the text of a file in UTF-8, UTF-16 or Windows-1252, or raises ValueError."""
    if problem := explain_no_file(path):
        raise ValueError(problem)
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES:,} bytes")
    text = _decode(data)
    if "\0" in text:
        raise ValueError("not a text file")
    return text


def _decode(data: bytes) -> str:
    """Decodes text by its byte order mark or its zeros, else as UTF-8 or Windows-1252."""
    start = data[:1000]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    for zeros, encoding in ((start[1::2], "utf-16-le"), (start[::2], "utf-16-be")):
        if 2 * zeros.count(0) > len(zeros) and 4 * start.count(0) < 3 * len(start):
            return data.decode(encoding, "replace")
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            pass
    return data.decode("latin-1")


def _parse(text: str, suffix: str) -> tuple[list[Line], str | None]:
    """Returns the lines of a sidecar file in seconds after the start, and a problem or None."""
    is_ass = suffix in (".ass", ".ssa") or text.lstrip()[:13].lower() == "[script info]"
    is_vtt = suffix == ".vtt" or text.lstrip().startswith("WEBVTT")
    format = "ass" if is_ass else "vtt" if is_vtt else "srt"
    lines: list[Line] = []
    unread = 0
    for count, cue in enumerate(_split_ass(text) if is_ass else _split_cues(text)):
        if count == MAX_LINES:
            return lines, f"only its first {MAX_LINES:,} lines are read"
        try:
            events = list(pysubs2.SSAFile.from_string(cue, format, keep_html_tags=True))
        except (ValueError, Pysubs2Error):  # of a time
            events = []
        unread += not events
        for event in events:
            content = _strip_ass(event.text) if is_ass else _strip_tags(event.text)
            line = make_line(event.start / 1000, event.end / 1000, content)
            lines += [line] if line else []
    if unread or not lines:
        return lines, f"lines with invalid times: {unread}" if unread else "no subtitles in it"
    return lines, None


def _split_ass(text: str) -> Iterator[str]:
    """Yields the dialogue lines with default settings: pysubs2 refuses some invalid ones."""
    for row in text.splitlines():
        kind, _, rest = row.partition(":")
        fields = rest.split(",", 9)
        if kind.strip().lower() == "dialogue" and len(fields) == 10:
            _, start, end, *_, content = fields
            times = f"{start[:30]},{end[:30]}"
            yield f"Dialogue: 0,{times},Default,,0,0,0,,{content[:_MAX_CUE_CHARACTERS]}"


def _split_cues(text: str) -> Iterator[str]:
    """Yields the cues of SubRip or WebVTT, each the line of its times and the text below it.

    pysubs2 would add what follows a blank line (comments, names of cues) to the text.
    """
    cue: list[str] = []
    is_text = False
    for row in text.splitlines():
        if "-->" in row:
            if cue:
                yield "\n".join(cue)
            cue, is_text = [row[:200]], True
        elif not row.strip():
            is_text = False
        elif is_text and len(cue) <= _MAX_CUE_LINES:
            cue.append(_TAG.sub("", row[: _MAX_CUE_CHARACTERS // _MAX_CUE_LINES]))
    if cue:
        yield "\n".join(cue)


def _strip_tags(text: str) -> str:
    """Returns text without tags of HTML, WebVTT and ASS, which SubRip files contain as well."""
    return html.unescape(_strip_ass(_TAG.sub("", text)))


def _strip_ass(text: str) -> str:
    """Returns text without ASS overrides, "" for a drawing."""
    if _DRAWING.search(text):
        return ""
    return _BREAK.sub(" ", _OVERRIDE.sub("", text))


def _read_streams(film: Film, zero: float) -> tuple[list[Line], str | None]:
    """Returns the lines of the text streams in seconds after `zero`, and a problem or None."""
    container = film.container
    streams = [s for s in container.streams.subtitles if _has_text(s)]
    lines: dict[int, list[Line]] = {stream.index: [] for stream in streams}
    unread, problem = 0, None
    try:
        for packet in container.demux(streams) if streams else ():
            if packet.pts is None or not packet.size or packet.size > MAX_BYTES:
                continue
            start = float(packet.pts * packet.time_base) - zero
            end = start + float((packet.duration or 0) * packet.time_base)
            try:
                texts = [_text_of(subtitle) for subtitle in packet.decode()]
            except (FFmpegError, ValueError):
                unread += 1
                continue
            made = (make_line(start, end, text) for text in texts)
            lines[packet.stream.index] += filter(None, made)
            if sum(map(len, lines.values())) > MAX_LINES:
                problem = f"only the first {MAX_LINES:,} subtitles in it are read"
                break
    except (FFmpegError, ValueError, IndexError) as error:  # of the container
        problem = f"subtitles in it: {reason(error)}"
    if unread and not problem:
        problem = f"subtitles in it that cannot be decoded: {unread}"
    return [line for source in lines.values() for line in fill_lengths(source)], problem


def _has_text(stream: Any) -> bool:
    context = stream.codec_context  # None without a decoder
    return context is not None and context.name in _TEXT_CODECS


def _text_of(subtitle: Any) -> str:
    """Returns the text of a decoded subtitle, which FFmpeg converts to ASS, "" for a picture."""
    dialogue = getattr(subtitle, "ass", b"")[: 2 * _MAX_CUE_CHARACTERS].decode("utf-8", "replace")
    return _strip_tags(dialogue.split(",", 8)[-1])
