"""Timed text of a film: lines that are said or written, and the segments they belong to."""

import bisect
import dataclasses
import itertools
import math
import unicodedata
from collections.abc import Iterable, Sequence

MAX_SECONDS = 1e6  # later times are invalid: a film of eleven days
MAX_CHARACTERS = 2000  # of a line, the rest is cut off
MAX_LINES = 200_000  # of a film: a line every 0.04 s for two hours
MIN_SECONDS, MAX_GUESS = 0.5, 3.0  # of a line whose source does not say how long it lasts
_ENOUGH = 0.5  # seconds of a line that suffice to belong to an interval


@dataclasses.dataclass(frozen=True, order=True)
class Line:
    """A text that is said or written. Times are seconds after the file's first frame."""

    start: float
    end: float  # after `start`, see `fill_lengths`
    text: str  # in Unicode's normal form C, words separated by single spaces


def make_line(start: float, end: float, text: str) -> Line | None:
    """Returns a valid line, or None if the text is empty or a time is invalid.

    Times below 0 become 0, and an end before the start becomes the start: then it has no length,
    see `fill_lengths`.
    """
    if not (math.isfinite(start) and math.isfinite(end) and max(start, end) <= MAX_SECONDS):
        return None
    text = text[: 4 * MAX_CHARACTERS].encode("utf-8", "ignore").decode()  # without surrogates
    text = " ".join(unicodedata.normalize("NFC", text).split())
    text = "".join(c for c in text if unicodedata.category(c) != "Cc")[:MAX_CHARACTERS].strip()
    return Line(max(start, 0.0), max(start, end, 0.0), text) if text else None


def fill_lengths(lines: Iterable[Line]) -> list[Line]:
    """Returns the lines of one source in the same order, each with an end after its start.

    One without length lasts until the next line that starts later, but from MIN_SECONDS to
    MAX_GUESS: a moment without length can be neither shown nor cut out.
    """
    lines = list(lines)
    starts = sorted({line.start for line in lines} | {math.inf})
    result = []
    for line in lines:
        if line.end <= line.start:
            length = starts[bisect.bisect_right(starts, line.start)] - line.start
            end = line.start + min(max(length, MIN_SECONDS), MAX_GUESS)
            line = dataclasses.replace(line, end=end)
        result.append(line)
    return result


def sort_lines(lines: Iterable[Line]) -> list[Line]:
    """Returns the lines by time, identical ones once."""
    return sorted(set(lines))


def split_lines(
    lines: Iterable[Line], intervals: Sequence[tuple[float, float]]
) -> list[list[Line]]:
    """Returns the lines of each interval [start, end), in the order given.

    A line belongs to every interval that it overlaps for half a second or half of its length, else
    to the one it overlaps most. One without length belongs to those that contain its start, one
    that overlaps none to none. Neither the starts nor the ends of `intervals` may decrease.
    """
    starts, ends = [start for start, _ in intervals], [end for _, end in intervals]
    assert all(a <= b for times in (starts, ends) for a, b in itertools.pairwise(times))
    result: list[list[Line]] = [[] for _ in intervals]
    for line in lines:
        first, length = bisect.bisect_right(ends, line.start), line.end - line.start
        find = bisect.bisect_left if length else bisect.bisect_right
        chosen = range(first, find(starts, line.end))
        overlaps = {k: min(line.end, ends[k]) - max(line.start, starts[k]) for k in chosen}
        enough = min(_ENOUGH, length / 2, max(overlaps.values(), default=0.0))
        for index, overlap in overlaps.items():
            if overlap >= enough:
                result[index].append(line)
    return result
