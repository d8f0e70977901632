"""Runs a query: pictures by the funnel, what is said and written by its words."""

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from xclip_jax.cli import InputError
from xclip_jax.data.tokenizer import is_blank
from xclip_jax.search.answers import Request, make_answer
from xclip_jax.search.funnel import Funnel
from xclip_jax.search.passages import MAX_PASSAGES, Passage, Passages
from xclip_jax.search.results import SOURCES, Answer, Source
from xclip_jax.search.row_ids import RowIds
from xclip_jax.search.selection import MAX_PATH, Filters, Selection
from xclip_jax.search.shards import Shards
from xclip_jax.search.words import parse_query
from xclip_jax.similarity import TextFeatures

MAX_SENTENCE = 10_000  # characters
MAX_FILTERED_PASSAGES = 50_000  # that match the words, among which the selected ones are found
MAX_DEPTH = 2**11  # segments scored by the full model for the sake of further results


class Options(Filters, total=False):
    """Options of a search: `Filters`, and which results are returned."""

    offset: int  # number of results to skip, e.g. those shown already
    merge: bool  # False: one result per segment; default: neighbouring ones are merged
    dedupe: bool  # True: near-duplicates are folded into the best of them


@dataclasses.dataclass(frozen=True)
class WordQuery:
    """The words of a query."""

    sentence: str = ""  # for the model
    rest: str = ""  # without the quoted phrases
    phrases: Sequence[str] = ()  # that must be said or written

    @classmethod
    def parse(cls, text: str) -> "WordQuery":
        """Splits the text of a query, or raises InputError if it is empty or too long."""
        text = check_sentence(text)
        rest, phrases = parse_query(text)
        return cls(rest or " ".join(phrases), rest, tuple(phrases))


@dataclasses.dataclass(frozen=True)
class Query:
    """A sentence or an example to search for."""

    funnel: Funnel | None  # None: pictures are not searched
    features: TextFeatures | None
    words: WordQuery = WordQuery()
    sources: Collection[Source] = ("picture",)
    exhaustive: bool = False
    without: str = ""  # id of a segment that is not a result


def run_query(
    query: Query, shards: Shards, selection: Selection, request: Request, passages: Passages
) -> Answer:
    """Searches the selected segments.

    Raises InputError if quoted phrases cannot be searched.
    """
    started, words = time.perf_counter(), query.words
    found, further = [], np.array([], np.int64)
    spoken = [source for source in query.sources if source != "picture"]
    if words.phrases and not spoken:
        problem = "the index or the query has no speech or text"
        raise InputError(f"{problem}: quoted words must be said or written")
    if spoken:
        options: Any = {"sources": spoken, "phrases": words.phrases, "interval": selection.interval}
        options["every_word"] = query.funnel is not None and not words.phrases
        found, further = _find_passages(shards, selection, passages, words.rest, options)
    seconds, chosen = {"words": time.perf_counter() - started}, selection
    request = dataclasses.replace(request, interval=selection.interval)
    if words.phrases:
        chosen = dataclasses.replace(chosen, only=further)
    if query.without:
        chosen = dataclasses.replace(chosen, without=shards.find(query.without))
    if query.funnel is None or query.features is None:
        answer = make_answer(shards.segments(further), None, found, request)
    else:
        answer = _rank_pictures(query, shards, chosen, request, passages=(found, further))
    is_counted = query.funnel is not None and chosen is selection
    searched = answer.searched if is_counted else shards.count(selection)
    seconds |= answer.seconds
    return dataclasses.replace(answer, seconds=seconds, searched=searched)


def _rank_pictures(
    query: Query,
    shards: Shards,
    selection: Selection,
    request: Request,
    *,
    passages: tuple[Sequence[Passage], RowIds],
) -> Answer:
    """Ranks by pictures, and by passages, which are given with their rows.

    If merging and folding leave too few hits, more segments are scored.
    """
    funnel, features, (found, further) = query.funnel, query.features, passages
    assert funnel is not None
    assert features is not None
    if query.exhaustive:
        depth = 2 * request.depth
        rankings = funnel.rank_exhaustively(shards, selection, features, depth, further=further)
        return make_answer(rankings[0].segments, rankings[0], found, request)
    depth = request.depth
    while True:
        ranking = funnel.rank(shards, selection, features, depth, further=further)
        answer = make_answer(ranking.segments, ranking, found, request)
        is_complete = len(answer) == request.k or len(ranking.rows) >= ranking.searched
        if is_complete or depth >= MAX_DEPTH:
            return answer
        depth = min(2 * max(depth, len(ranking.rows)), max(MAX_DEPTH, request.depth))


def _find_passages(
    shards: Shards, selection: Selection, passages: Passages, text: str, options: dict[str, Any]
) -> tuple[list[Passage], RowIds]:
    """Returns the best passages of the selected rows, and these rows, best first."""
    limit, before = MAX_PASSAGES, -1
    while True:
        matching = passages.search(text, **options, limit=limit)
        rows_of = shards.rows_of({passage.id for passage in matching}, selection)
        found = [passage for passage in matching if passage.id in rows_of][:MAX_PASSAGES]
        is_complete = selection.is_everything or len(found) == MAX_PASSAGES
        if is_complete or len(matching) == before or limit >= MAX_FILTERED_PASSAGES:
            rows = dict.fromkeys(rows_of[passage.id] for passage in found)
            return found, np.array(list(rows), np.int64)
        limit, before = 16 * limit, len(matching)


def check_sentence(text: str) -> str:
    """Returns a sentence without lone surrogates, or raises InputError if it is empty or long."""
    text = text.encode("utf-8", "replace").decode()
    if len(text) > MAX_SENTENCE:
        raise InputError(f"the sentence has more than {MAX_SENTENCE:,} characters")
    if is_blank(text):
        raise InputError("the sentence is empty")
    return text


def parse_sources(text: str) -> list[Source]:
    """Returns the sources in a comma-separated list, or raises InputError for another name."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in SOURCES]:
        raise InputError(f"--in={text}: must be of {', '.join(SOURCES)}, not {unknown[0]!r}")
    return [source for source in SOURCES if source in names]


def choose_sources(
    sources: Collection[Source] | None, known: Sequence[Source]
) -> Collection[Source]:
    """Returns the known ones of `sources`, all if it is None, or raises InputError for none."""
    if sources is None:
        return known
    if not sources or set(sources) - set(SOURCES):
        raise InputError(f"sources = {list(sources)}: must be one or more of {', '.join(SOURCES)}")
    chosen: list[Source] = [source for source in known if source in sources]
    if not chosen:
        advice = {"text": "run index with --ocr", "speech": "run index with --speech"}
        advice["speech"] += ", or put subtitles beside the films and run index"
        missing = [source for source in SOURCES if source in sources]
        hints = "; ".join(advice[source] for source in missing if source in advice)
        raise InputError(f"the index has no {' or '.join(missing)}: {hints}")
    return chosen


def split_options(k: int, options: Options) -> tuple[Selection, Request]:
    """Returns what to search and what to return, or raises InputError for invalid values."""
    given: dict[str, Any] = dict(options)
    request = Request(k, **{n: given.pop(n) for n in ("offset", "merge", "dedupe") if n in given})
    if not isinstance(k, int) or k < 1:
        raise InputError(f"k = {k!r}: must be an integer of at least 1")
    if not isinstance(request.offset, int) or request.offset < 0:
        raise InputError(f"offset = {request.offset!r}: must be an integer of at least 0")
    filters: Any = given
    _check_filters(filters)
    return Selection(**filters), request


def _check_filters(filters: Filters) -> None:
    """Raises InputError if filters have invalid types or values, or start > end."""
    path, start, end = filters.get("path"), filters.get("start"), filters.get("end")
    if not isinstance(path, str | None) or len(path or "") > MAX_PATH:
        raise InputError(f"path: must be a string of at most {MAX_PATH} characters")
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (isinstance(value, int | float) and 0 <= value < np.inf):
            raise InputError(f"{name} = {value!r:.99}: must be a number of seconds, at least 0")
    if start is not None and end is not None and start > end:
        raise InputError(f"start = {start:g}, end = {end:g}: start must not be after end")
