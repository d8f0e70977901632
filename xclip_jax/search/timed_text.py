"""Adds what is said and written to an index: subtitles, transcribed sound, text on screen.

Each reader processes the indexed files that it has not read yet.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xclip_jax.cli import progress
from xclip_jax.data.container import AccessError, VideoError
from xclip_jax.data.extraction import CRASHED
from xclip_jax.search.digests import describe_files
from xclip_jax.search.lines import Line, split_lines
from xclip_jax.search.passages import Found, Reader
from xclip_jax.search.screen_text import load_engine, read_screen_text
from xclip_jax.search.speech import Transcriber
from xclip_jax.search.store import FileStamp, Store, retry_commit
from xclip_jax.search.subtitles import find_all_sidecars, has_text_streams, read_subtitles
from xclip_jax.workers import run_jobs

COMMIT_SECONDS = 5
MAX_LINES = 1000  # of a segment
Result = tuple[list[Line], list[str]]  # lines, and problems
_NAMES: dict[Reader, str] = {"subtitles": "subtitles", "speech": "speech", "ocr": "text on screen"}


@dataclasses.dataclass(frozen=True)
class TextJob:
    """A film whose text is read."""

    path: str
    files: Sequence[str]  # beside it, which the text depends on
    state: tuple[int, int, str]  # size, mtime (ns), and what else the text depends on
    read: Callable[["TextJob"], Result]  # raises VideoError


@dataclasses.dataclass(frozen=True)
class TextReader:
    """A way of reading the text of a film."""

    name: Reader
    read: Callable[[TextJob], Result]
    model: str = ""  # the text is read again with another one
    in_processes: bool = True  # False: the model itself uses all cores


def make_readers(*, ocr: bool, speech: str | None) -> list[TextReader]:
    """Returns the readers of an update, see `xclip_jax.search.Index.add`.

    Raises InputError if a package or model is missing.
    """
    readers = [TextReader("subtitles", _read_subtitles)]
    if speech is not None:
        read = functools.partial(_transcribe, Transcriber(speech))
        readers.append(TextReader("speech", read, speech, in_processes=False))
    if ocr:
        load_engine()
        readers.append(TextReader("ocr", _read_screen))
    return readers


def add_texts(
    store: Store,
    stamps: Mapping[str, FileStamp],
    readers: Sequence[TextReader],
    problems: dict[str, str],
) -> int:
    """Reads the text of the indexed ones of these files, unless it is in the index already.

    Adds the reasons of what could not be read to `problems`, by path. Returns the number of files
    in which text was found.
    """
    segments: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    with_text = store.passages.paths()  # before the rows: other processes may add films and text
    rows = store.intervals().to_pylist()
    # A killed process may have left the text of removed films.
    store.passages.remove_files(with_text - {row["path"] for row in rows})
    for row in rows:
        if stamps.get(row["path"]) == (row["size"], row["mtime"]):
            segments[row["path"]].append(row)
    films: set[str] = set()
    for reader in readers:
        known = store.passages.files(reader.name)
        files: dict[str, Sequence[str]] = dict.fromkeys(sorted(segments), ())
        if reader.name == "subtitles":
            files |= find_all_sidecars(files)
        jobs: list[TextJob] = []
        for path, beside in files.items():
            state = (*stamps[path], reader.model + describe_files(beside))
            jobs.append(TextJob(path, beside, state, reader.read))
        if todo := [job for job in jobs if known.get(job.path) != job.state]:
            films |= _run(store, reader, todo, segments, problems)
            retry_commit(store.passages.compact)
    return len(films)


def _run(
    store: Store,
    reader: TextReader,
    jobs: Sequence[TextJob],
    segments: Mapping[str, Sequence[Mapping[str, Any]]],
    problems: dict[str, str],
) -> set[str]:
    """Reads films in worker processes or one after the other, and commits at intervals."""
    found: list[Found] = []
    with_text: set[str] = set()
    commit_time = time.monotonic()

    def commit() -> None:
        nonlocal commit_time
        retry_commit(functools.partial(store.passages.add, reader.name, found))
        found.clear()
        commit_time = time.monotonic()

    def add(job: TextJob, lines: Sequence[Line]) -> None:
        if lines:
            with_text.add(job.path)
        found.append(Found(job.path, job.state, _assign(lines, segments[job.path])))
        if time.monotonic() - commit_time > COMMIT_SECONDS:
            commit()

    def done(index: int, result: tuple[Result, bool] | None) -> None:
        job, ((lines, reasons), retry) = expected[index], result or (([], [CRASHED]), True)
        if reasons:
            problems[job.path] = f"{_NAMES[reader.name]}: {'; '.join(reasons)}"
        if not retry:  # else the next update reads the film again
            add(job, lines)
        bar.update(1)

    expected: list[TextJob] = []
    with progress(len(jobs), f"reading {_NAMES[reader.name]}", "file") as bar:
        for job in jobs:
            if reader.name != "subtitles" or job.files or _has_text_streams(job.path):
                expected.append(job)
            else:
                add(job, [])
                bar.update(1)
        if reader.in_processes:
            run_jobs(_read, expected, done)
        else:
            for index, job in enumerate(expected):
                done(index, _read(job))
        commit()
    return with_text


def _read(job: TextJob) -> tuple[Result, bool]:
    """Reads a film's text, in a worker process or in this one.

    Returns its result, and True if the problem may be temporary.
    """
    try:
        return job.read(job), False
    except VideoError as error:
        return ([], [str(error)]), isinstance(error, AccessError)
    except Exception as error:  # of a model's runtime
        return ([], [f"{type(error).__name__}: {error}"]), True


def _assign(lines: Sequence[Line], segments: Sequence[Mapping[str, Any]]) -> dict[str, list[Line]]:
    """Returns {id of a segment: its lines}, at most MAX_LINES of each."""
    ordered = sorted(segments, key=lambda row: (row["start"], row["end"]))
    parts = split_lines(lines, [(row["start"], row["end"]) for row in ordered])
    return {row["id"]: part[:MAX_LINES] for row, part in zip(ordered, parts, strict=True)}


def _read_subtitles(job: TextJob) -> Result:
    lines, problems = read_subtitles(job.path, job.files)
    return lines, problems


def _read_screen(job: TextJob) -> Result:
    return read_screen_text(job.path), []


def _transcribe(transcriber: Transcriber, job: TextJob) -> Result:
    return transcriber.transcribe(job.path), []


def _has_text_streams(path: str) -> bool:
    try:
        return has_text_streams(path)
    except VideoError:
        return True  # the reader reports it
