"""Asks all parts of an index, and merges what they answer."""

import abc
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from xclip_jax.cli import InputError
from xclip_jax.search.row_ids import RowIds, find_parts
from xclip_jax.search.selection import EVERYTHING, Selection
from xclip_jax.search.shard import Nearest, Scored, Scores, Segments, Shard
from xclip_jax.similarity import TextFeatures, VideoFeatures


class UnavailableError(InputError):
    """The error that parts of an index do not answer: a later attempt may succeed."""


class LostError(Exception):
    """The error that parts of an index do not answer: `numbers` says which."""

    def __init__(self, numbers: Collection[int]) -> None:
        names = ", ".join(str(number + 1) for number in sorted(numbers))
        super().__init__(f"shards {names} of the index do not answer")
        self.numbers = frozenset(numbers)


class Parts(abc.ABC):
    """The `count` parts of one version of an index, in this process or elsewhere."""

    count: int

    @abc.abstractmethod
    def ask(self, method: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Calls a method of `Shard` in parts, with arguments by number, or raises LostError."""


class LocalParts(Parts):
    """The only part of an index, in this process."""

    count = 1

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def ask(self, method: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Calls a method of the part."""
        return {number: getattr(self.shard, method)(*args) for number, args in arguments.items()}


class Shards:
    """One version of an index, whose parts are asked together.

    `without` are the numbers of parts that are not asked, as they are lost.
    """

    def __init__(self, parts: Parts, without: Collection[int] = ()) -> None:
        self._parts = parts
        self.without = frozenset(without)
        self._numbers = [n for n in range(parts.count) if n not in self.without]

    def nearest(
        self, selection: Selection, vector_1xD: np.ndarray, count: int, by_example: bool
    ) -> Nearest:
        """Returns the first stage's best rows, at most `count`, see `Shard.nearest`."""
        answers = self._ask_all("nearest", selection, vector_1xD, count, by_example)
        if len(answers) == 1:
            return answers[0]
        rows = np.concatenate([answer.rows for answer in answers])
        products = np.concatenate([answer.products for answer in answers])
        order = np.lexsort((rows, -products))[:count]
        searched = sum(answer.searched for answer in answers)
        return Nearest(rows[order], products[order], searched)

    def count(self, selection: Selection) -> int:
        """Returns the number of selected rows."""
        return sum(self._ask_all("count", selection))

    def score_words(self, rows: RowIds, text: TextFeatures) -> Scores:
        """Returns the second stage's scores minus biases of n rows."""
        return self._gather("score_words", rows, text)

    def score(self, rows: RowIds, text: TextFeatures, by_example: bool) -> Scored:
        """Returns the scores of n rows by the full model, and what their hits are made of."""
        scored = self._gather("score", rows, text, by_example)
        return dataclasses.replace(scored, segments=self._add_durations(scored.segments))

    def score_all(self, selection: Selection, text: TextFeatures) -> tuple[RowIds, np.ndarray]:
        """Returns the selected rows, and the scores of T sentences with them, T x n."""
        answers = self._ask_all("score_all", selection, text)
        rows = np.concatenate([rows for rows, _ in answers])
        order = np.argsort(rows)
        return rows[order], np.concatenate([sim_TxN for _, sim_TxN in answers], 1)[:, order]

    def biases(self, rows: RowIds) -> Scores:
        """Returns the hubness biases of n rows as logits."""
        return self._gather("biases", rows)

    def segments(self, rows: RowIds) -> Segments:
        """Returns what hits of n rows are made of."""
        return self._add_durations(self._gather("segments", rows))

    def rows_of(self, ids: Collection[str], selection: Selection = EVERYTHING) -> dict[str, int]:
        """Returns {id: row id} of the segments that are selected."""
        answers = self._ask_all("rows_of", list(ids), selection) if ids else []
        return {one: row for answer in answers for one, row in answer.items()}

    def find(self, segment_id: str) -> RowIds:
        """Returns the row of a segment, or raises KeyError for an unknown id."""
        rows = self.rows_of([segment_id])
        if self.without and segment_id not in rows:
            problem = "a shard of the index does not answer"
            raise UnavailableError(f"{problem}: try again in some seconds")
        return np.array([rows[segment_id]])

    def films(self) -> pa.Table:
        """Returns the table of the files, see `Snapshot.films`."""
        films = pa.concat_tables(self._ask_all("films"))
        if len(self._numbers) == 1:
            return films
        groups = films.group_by("path", use_threads=False)
        names = ("end_max", "max"), ("mtime_max", "max"), ("row_id_min", "min")
        merged = groups.aggregate([*names])
        return merged.rename_columns({f"{name}_{kind}": name for name, kind in names})

    def features(self, row: RowIds) -> VideoFeatures:
        """Reads the VideoFeatures of one row."""
        return self._ask_one("features", row)

    def stamp(self, row: RowIds) -> dict[str, Any]:
        """Reads what is stored of a row's file, see `Snapshot.stamp`."""
        return self._ask_one("stamp", row)

    def thumbnail(self, row: RowIds) -> bytes:
        """Reads the JPEG thumbnail of a row."""
        return self._ask_one("thumbnail", row)

    def _add_durations(self, segments: Segments) -> Segments:
        """Returns segments with the durations of their films, which may be in several parts."""
        if len(self._numbers) == 1 or not segments.paths:
            return segments
        durations = np.max(self._ask_all("durations", segments.paths), 0)
        return dataclasses.replace(segments, durations=durations)

    def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        answers = self._parts.ask(method, dict.fromkeys(self._numbers, arguments))
        return [answers[number] for number in self._numbers]

    def _ask_one(self, method: str, row: RowIds) -> Any:
        number = int(find_parts(row, self._parts.count)[0])
        return self._parts.ask(method, {number: (row,)})[number]

    def _gather(self, method: str, rows: RowIds, *arguments: Any) -> Any:
        """Asks each part for its own ones of n rows, and returns the answers in their order."""
        owners = find_parts(rows, self._parts.count)
        numbers = np.unique(owners).tolist() or self._numbers[:1]
        asked = {number: (rows[owners == number], *arguments) for number in numbers}
        answers = self._parts.ask(method, asked)
        if len(numbers) == 1:
            return answers[numbers[0]]
        places = np.argsort(np.concatenate([np.flatnonzero(owners == n) for n in numbers]))
        return _concatenate([answers[number] for number in numbers], places)


def _concatenate(answers: Sequence[Any], places: np.ndarray) -> Any:
    """Returns arrays, lists, or dataclasses of these, one after the other, taken at `places`."""
    first = answers[0]
    if dataclasses.is_dataclass(first):
        fields = [field.name for field in dataclasses.fields(first)]
        columns = {n: _concatenate([getattr(a, n) for a in answers], places) for n in fields}
        make: Callable[..., Any] = type(first)
        return make(**columns)
    if isinstance(first, np.ndarray):
        return np.concatenate(answers)[places]
    joined = [value for answer in answers for value in answer]
    return [joined[place] for place in places]
