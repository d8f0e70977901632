"""Stores what is said and written in films as timed text, and searches it by words.

Table `passages` has one row per segment and reader, with the lines of that segment; `read_texts`
one per file and reader, also without lines. Indexes of earlier versions have neither.
"""

import dataclasses
import datetime
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import FTS
from lancedb.query import FullTextOperator, MatchQuery

from xclip_jax.search.lines import Line
from xclip_jax.search.moments import Interval
from xclip_jax.search.readable import find_table, readable
from xclip_jax.search.repeats import delete_repeated_rows
from xclip_jax.search.results import Match, Source
from xclip_jax.search.words import STOP_WORDS, normalize, terms

Reader = Literal["subtitles", "speech", "ocr"]
SOURCE_OF: dict[Reader, Source] = {"subtitles": "speech", "speech": "speech", "ocr": "text"}
MAX_PASSAGES = 200  # of a query
MAX_RUN = 10  # lines that are quoted together
MAX_QUOTE = 500  # characters
FILE_FIELDS = [("path", pa.string()), ("size", pa.int64()), ("mtime", pa.int64())]
_LINE = pa.struct([("start", pa.float64()), ("end", pa.float64()), ("text", pa.string())])
_PASSAGES = pa.schema(
    [
        ("id", pa.string()),
        ("reader", pa.string()),
        *FILE_FIELDS,
        ("words", pa.string()),  # of the lines, normalized
        ("lines", pa.list_(_LINE)),
    ]
)
_FILES = pa.schema([*FILE_FIELDS, ("reader", pa.string()), ("state", pa.string())])


@dataclasses.dataclass(frozen=True)
class Passage:
    """A segment in which words of a query are said or written."""

    id: str  # of the segment
    match: Match


@dataclasses.dataclass(frozen=True)
class Found:
    """The text that a reader found in a film."""

    path: str
    state: tuple[int, int, str]  # size (bytes), mtime (ns), what else the text depends on
    lines_of: Mapping[str, Sequence[Line]]  # {id of a segment: its lines}


class Passages:
    """The timed text of an index.

    `location` is its folder or URI, `sources` are those with at least one passage.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._passages: Any = None
        self._files: Any = None
        self._version, self.sources = 0, frozenset[Source]()
        self.refresh()

    def create(self) -> None:
        """Creates the tables and the full-text index, if they do not exist.

        An index gets them before its first rows: of two processes that create a table together, one
        may replace what the other has added.
        """
        if self._passages is None:
            database = lancedb.connect(self.location)
            options: Any = {"mode": "create", "exist_ok": True}
            self._files = database.create_table("read_texts", schema=_FILES, **options)
            self._passages = database.create_table("passages", schema=_PASSAGES, **options)
        self._passages.checkout_latest()
        if not self._passages.list_indices():
            stop_words: Any = sorted(STOP_WORDS)
            config = FTS(stem=True, remove_stop_words=True, custom_stop_words=stop_words)
            self._passages.create_index("words", config=config)

    def refresh(self) -> bool:
        """Opens the latest version, and returns True if it is a new one."""
        with readable(self.location):
            if self._passages is None:
                table = find_table(self.location, "passages")
                if table is None:
                    return False
                self._passages = table
            table = self._passages
            table.checkout_latest()
            if table.version == self._version:
                return False
            found = {s for r, s in SOURCE_OF.items() if table.count_rows(f"reader = '{r}'")}
            self._version, self.sources = table.version, frozenset(found)
            return True

    def _latest(self) -> tuple[Any, ...]:
        """Returns the latest `passages` and `read_texts`, () if they do not exist."""
        self.refresh()
        if self._passages is None:
            return ()
        if self._files is None:
            self._files = lancedb.connect(self.location).open_table("read_texts")
        self._files.checkout_latest()
        return self._passages, self._files

    def files(self, reader: Reader) -> dict[str, tuple[int, int, str]]:
        """Returns {path: (size, mtime, state)} of the files that a reader has read."""
        with readable(self.location):
            if not (tables := self._latest()):
                return {}
            rows = tables[1].search().where(f"reader = '{reader}'").to_arrow().to_pylist()
        return {row["path"]: (row["size"], row["mtime"], row["state"]) for row in rows}

    def add(self, reader: Reader, found: Sequence[Found]) -> None:
        """Replaces the text that a reader found in films."""
        if not found:
            return
        self.create()
        rows, files = [], []
        for one in found:
            size, mtime, state = one.state
            columns = {"path": one.path, "size": size, "mtime": mtime, "reader": reader}
            files.append({**columns, "state": state})
            rows += [
                {
                    "id": segment,
                    **columns,
                    "words": normalize(" ".join(line.text for line in lines)),
                    "lines": [dataclasses.asdict(line) for line in lines],
                }
                for segment, lines in one.lines_of.items()
                if lines
            ]
        paths = ", ".join(to_sql(one.path) for one in found)
        condition = f"reader = '{reader}' AND path IN ({paths})"
        for table, new, schema in zip(
            self._latest(), (rows, files), (_PASSAGES, _FILES), strict=True
        ):
            if table.count_rows(condition):
                table.delete(condition)
            if new:
                table.add(pa.Table.from_pylist(new, schema))

    def remove(self, condition: str) -> None:
        """Commits the removal of the files that match an SQL condition on path, size and mtime."""
        for table in self._latest():
            if table.count_rows(condition):
                table.delete(condition)

    def paths(self) -> set[str]:
        """Returns the paths of the films that some reader has read."""
        with readable(self.location):
            if not (tables := self._latest()):
                return set()
            return set(tables[1].search().select(["path"]).to_arrow()["path"].to_pylist())

    def remove_files(self, paths: Collection[str]) -> None:
        """Removes the text of films."""
        if paths:
            self.remove(f"path IN ({', '.join(map(to_sql, sorted(paths)))})")

    def compact(self) -> None:
        """Merges small files and adds new passages to the full-text index."""
        if not (tables := self._latest()):
            return
        for table, name in zip(tables, ("id", "path"), strict=True):
            delete_repeated_rows(table, (name, "reader"))
            table.checkout_latest()
            table.optimize(cleanup_older_than=datetime.timedelta(hours=1))
        self.create()  # a process may have been killed before it created the full-text index

    def search(
        self,
        text: str,
        *,
        sources: Collection[Source],
        phrases: Sequence[str] = (),
        every_word: bool = False,
        interval: Interval = (-np.inf, np.inf),
        limit: int = MAX_PASSAGES,
    ) -> list[Passage]:
        """Returns the passages of a query, by decreasing BM25.

        Args:
            text: words, of which the commonest of English are ignored and endings do not matter.
            sources: where to search.
            phrases: texts that must occur.
            every_word: True to require all words of `text`, else any.
            interval: seconds of a film to which the matched lines are restricted.
            limit: number of segments.
        """
        readers = [reader for reader, source in SOURCE_OF.items() if source in sources]
        words = normalize(" ".join([text, *phrases]))
        if self._passages is None or not readers or not words.strip():  # e.g. only punctuation
            return []
        conditions = [f"reader IN ({', '.join(map(to_sql, readers))})"]
        # The index has no stop words: a query of nothing else is searched as a phrase.
        wanted = [*phrases] if phrases or terms(text) else [text]
        conditions += [f"contains(words, {to_sql(normalize(phrase))})" for phrase in wanted]
        condition = " AND ".join(conditions)
        make_query: Any = MatchQuery  # whose defaults pyright does not see
        operator = FullTextOperator.AND if every_word else FullTextOperator.OR
        query = make_query(words, "words", operator=operator)
        with readable(self.location):
            search = self._passages.search(query, query_type="fts").where(condition)
            rows = search.limit(limit).to_arrow().to_pylist()
            if wanted and not any(map(terms, wanted)):  # of stop words only
                others = self._passages.search().where(condition).limit(limit).to_arrow()
                known = {(row["id"], row["reader"]) for row in rows}
                rows += [r for r in others.to_pylist() if (r["id"], r["reader"]) not in known]
        # Two processes that have read the same film leave its passages twice for a moment.
        rows = {(row["id"], row["reader"]): row for row in reversed(rows)}.values()
        unique = list(reversed(rows))[:limit]
        passages = (_make_passage(row, text, wanted, interval) for row in unique)
        return [passage for passage in passages if passage]


def _make_passage(
    row: Mapping[str, Any], text: str, phrases: Sequence[str], interval: Interval
) -> Passage | None:
    """Returns a row as a passage with the lines that match, None if none in the interval does."""
    lines = [Line(**line) for line in row["lines"]]
    inside = [one for one in lines if one.end >= interval[0] and one.start <= interval[1]]
    chosen = [inside[k] for k in match_lines([line.text for line in inside], text, phrases)]
    if not chosen:
        if len(inside) < len(lines):
            return None
        chosen = lines[:MAX_RUN]
    ends = chosen[0].start, max(line.end for line in chosen)
    start, end = (float(np.clip(time, *interval)) for time in ends)
    quote = " ".join(dict.fromkeys(line.text for line in chosen))
    if len(quote) > MAX_QUOTE:
        quote = f"{quote[:MAX_QUOTE].rstrip()} ..."
    score = row.get("_score", 0.0)
    return Passage(row["id"], Match(SOURCE_OF[row["reader"]], score, start, end, quote))


def match_lines(lines: Sequence[str], text: str, phrases: Sequence[str]) -> list[int]:
    """Returns the indices of the lines that match best, in order, [] if none does.

    These are the shortest runs with each of the phrases, or, without phrases, a run with words of
    a text, of which those in few of the lines count more. A run has at most MAX_RUN lines.
    """
    if phrases:
        words = [normalize(line).split() for line in lines]
        runs = [_find_phrase(words, phrase) for phrase in map(normalize, phrases)]
        return sorted({k for run in runs for k in run})
    line_terms, wanted = [set(terms(line)) for line in lines], set(terms(text))
    counts = {term: sum(term in line for line in line_terms) for term in wanted}
    scores = np.array([sum(1 / counts[term] for term in wanted & line) for line in line_terms])
    if not scores.any():
        return []
    best = first = last = int(scores.argmax())
    while first > max(0, last + 1 - MAX_RUN) and 2 * scores[first - 1] >= scores[best]:
        first -= 1
    while last + 1 < min(len(scores), first + MAX_RUN) and 2 * scores[last + 1] >= scores[best]:
        last += 1
    return list(range(first, last + 1))


def _find_phrase(words: Sequence[Sequence[str]], phrase: str) -> range:
    """Returns the shortest run of lines, given as words, with a normalized phrase."""
    for length in range(1, min(len(words), MAX_RUN) + 1):
        for first in range(len(words) - length + 1):
            joined = " ".join(itertools.chain(*words[first : first + length]))
            if phrase in f" {joined} ":
                return range(first, first + length)
    return range(0)


def to_sql(text: str) -> str:
    """Returns an SQL string."""
    return "'" + text.replace("'", "''") + "'"
