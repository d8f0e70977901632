"""Requests and answers of the search server, as its OpenAPI document describes them."""

import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, computed_field, model_validator

from xclip_jax.cli import InputError
from xclip_jax.search import results
from xclip_jax.search.bodies import NOT_JSON
from xclip_jax.search.querying import MAX_SENTENCE
from xclip_jax.search.results import Source
from xclip_jax.search.selection import MAX_PATH

MAX_HITS, MAX_RANK, MAX_FILMS = 100, 1000, 100
_SECONDS = "a number of seconds, at least 0"
_SENTENCE = f"a string of at most {MAX_SENTENCE:,} characters"
RULES = {  # of the fields of requests, quoted by the OpenAPI document and by errors
    "text": _SENTENCE,
    "path": f"a string of at most {MAX_PATH:,} characters",
    "k": f"between 1 and {MAX_HITS}",
    "offset": f"between 0 and {MAX_RANK}",
    "start": _SECONDS,
    "end": _SECONDS,
    "second": _SECONDS,
    "sources": 'a list with one or more of "picture", "speech", "text"',
    "dedupe": "true or false",
    "name": "a file name",
}
_MEANINGS = {
    "text": "The sentence. What is in double quotes must occur in what is said or written.",
    "path": "Only files whose path contains this; * and ? as in a shell.",
    "k": "Number of hits.",
    "offset": f"Number of hits to skip; offset + k is at most {MAX_RANK}.",
    "start": "Only moments after this second of their film.",
    "end": "Only moments before this second of their film.",
    "second": "Second of the film.",
    "sources": "Where to search; null: in everything that the index has.",
    "dedupe": "True to fold near-duplicates into one hit; null: as the server was started.",
    "name": "Name of the file, whose suffix is that of a video or an image.",
}


def _limit_length(limit: int, text: str) -> str:
    if len(text) > limit:
        raise ValueError
    return re.sub("[\ud800-\udfff]", "\ufffd", text)  # JSON allows lone surrogates


def describe(name: str) -> str:
    """Returns the description of a request's field."""
    return f"{_MEANINGS[name]} Must be {RULES[name]}."


def _field(name: str, default: Any, **limits: Any) -> Any:
    return Field(default, description=describe(name), **limits)


Sentence = Annotated[
    str,
    AfterValidator(partial(_limit_length, MAX_SENTENCE)),
    Field(json_schema_extra={"minLength": 1, "maxLength": MAX_SENTENCE}),
]
PathFilter = Annotated[
    str,
    AfterValidator(partial(_limit_length, MAX_PATH)),
    Field(json_schema_extra={"maxLength": MAX_PATH}),
]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def explain(error: Mapping[str, Any]) -> str:
    """Returns what is wrong with a request, of which this is an error of pydantic."""
    name = next((part for part in error["loc"] if part in RULES), None)
    if name is not None:
        return f"{name} must be {RULES[name]}"
    cause = error.get("ctx", {}).get("error")
    return str(cause) if isinstance(cause, ValueError) else NOT_JSON


class _Request(BaseModel):
    """Fields of a request. None and "" count as missing."""

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value not in (None, "")}


_EXAMPLE: Any = {"text": "a dog on a skateboard"}
# The index itself refuses a sentence that is empty.
_NEEDS_TEXT = ConfigDict(json_schema_extra={"required": ["text"], "example": _EXAMPLE})


class Filters(_Request):
    """The hits that a search returns."""

    k: int = _field("k", 24, ge=1, le=MAX_HITS)
    offset: int = _field("offset", 0, ge=0, le=MAX_RANK)
    dedupe: bool | None = _field("dedupe", None)
    path: PathFilter | None = _field("path", None)
    start: Seconds | None = _field("start", None)
    end: Seconds | None = _field("end", None)

    @model_validator(mode="after")
    def _limit_rank(self) -> "Filters":
        if self.offset + self.k > MAX_RANK:
            raise ValueError(f"offset + k must be at most {MAX_RANK}")
        return self

    def options(self, dedupe: bool) -> dict[str, Any]:
        """Returns the options of `Index.query`, with the server's value of `dedupe`."""
        options = self.model_dump(exclude={"text", "sources", "name"})
        return options | {"dedupe": dedupe if self.dedupe is None else self.dedupe}


class SearchRequest(Filters):
    """A search by a sentence."""

    model_config = _NEEDS_TEXT
    text: Sentence = _field("text", "")
    sources: list[Source] | None = _field("sources", None, min_length=1)

    def options(self, dedupe: bool) -> dict[str, Any]:
        """Returns the options of `Index.query`, with the server's value of `dedupe`."""
        given = {"sources": tuple(dict.fromkeys(self.sources))} if self.sources else {}
        return super().options(dedupe) | given


class ExampleRequest(Filters):
    """A search by the image or video in the body."""

    name: str = _field("name", "")


class HeatMapRequest(_Request):
    """A sentence to compare with the frames of a segment."""

    model_config = _NEEDS_TEXT
    text: Sentence = _field("text", "")


class FilmsRequest(_Request):
    """Number of films."""

    k: int = Field(12, ge=1, le=MAX_FILMS, description=f"Number of films. Must be {RULES['k']}.")


class StillRequest(_Request):
    """Time of a picture."""

    second: Seconds | None = _field("second", None)


class MomentRequest(_Request):
    """A part of a film, in seconds after its first frame."""

    start: Seconds = Field(description=f"Start of the moment. Must be {_SECONDS}.")
    end: Seconds = Field(description=f"End of the moment. Must be {_SECONDS}.")

    @model_validator(mode="after")
    def _check_order(self) -> "MomentRequest":
        if self.end <= self.start:
            raise ValueError(f"end = {self.end:g}: must be after start = {self.start:g}")
        return self

    def check_length(self, kind: str, most: float) -> None:
        """Raises InputError if the moment is longer than `most` seconds."""
        if self.end - self.start > most:
            raise InputError(
                f"a {kind} has at most {most:g} seconds, not {self.end - self.start:g}"
            )


class AddRequest(_Request):
    """Name of the video in the body."""

    name: str = Field("", description="Name of the file, whose suffix is that of a video.")


class Answer(BaseModel):
    """An answer, read from the attributes of a dataclass."""

    model_config = ConfigDict(from_attributes=True)


class Error(Answer):
    """A refused request."""

    error: str = Field(description="What is wrong, in one line.")


class Match(Answer):
    """A source in which a hit was found."""

    source: Source = Field(description="picture: seen; speech: said; text: written on screen.")
    score: float = Field(description="Of a picture the model's logit, else BM25 of the passage.")
    start: float
    end: float
    text: str = Field(description="The lines that are said or written from start to end.")


class Hit(Answer):
    """A moment of a film. All times are seconds after the file's first frame."""

    rank: int = Field(description="Position in the results, from 1; 0: no result.")
    score: float | None = Field(description="The model's logit; null: pictures not searched.")
    id: str = Field(description="Segment that holds the best second: 16 hexadecimal digits.")
    path: str = Field(description="The video file, as the server sees it.")
    start: float = Field(description="Start of the moment.")
    end: float = Field(description="End of the moment.")
    second: float = Field(description="Best second of the moment.")
    segment_start: float
    segment_end: float
    duration: float = Field(description="Length of the film.")
    offset: float = Field(description="From the start of the file, as players count, to frame 1.")
    bias: float = Field(description="Hubness bias: results are ranked by score - bias.")
    weak: bool = Field(description="True: the score is that of unrelated pairs.")
    matches: list[Match] = Field(description="Sources that matched, best first.")
    duplicates: list["Hit"] = Field(description="Near-duplicates that are folded into this hit.")

    @computed_field(description="Name of the file.")
    @property
    def name(self) -> str:
        """Name of the file."""
        return os.path.basename(self.path)


class Hits(Answer):
    """The results of a search."""

    hits: list[Hit]
    searched: int = Field(description="Number of segments that passed the filters.")
    note: str | None = Field(description="For the user, e.g. that the sentence was truncated.")
    missing: int = Field(description="Number of shards that did not answer, see serve --shards.")
    seconds: float = Field(description="Time that the search took.")
    stages: dict[str, float] = Field(description="Seconds of each stage, by its name.")


class HitsLike(Hits):
    """The results of a search by a segment."""

    like: Hit = Field(description="The segment that was searched by.")


class HeatMap(Answer):
    """Similarities of W words and of their sentence to the F frames of a segment, as cosines."""

    words: list[str]
    times: list[float] = Field(description="F seconds after the file's first frame.")
    words_by_frames: list[list[float]] = Field(description="W rows of F similarities.")
    sentence: list[float] = Field(description="F similarities, smoothed over neighbours.")


class Facts(Answer):
    """Sizes of the index and the limits of the server."""

    segments: int
    files: int
    model: str = Field(description="Name of the model.")
    max_upload_bytes: int
    sources: list[Source] = Field(description="Sources that the index has.")
    examples: list[str] = Field(description="Sentences to try.")
    can_add: bool = Field(description="True if the server accepts videos.")
    has_text: bool = Field(description="True if something said or written can be searched.")
    dedupe: bool = Field(description="Default of dedupe in requests.")


class Film(Answer):
    """A video file of the index."""

    id: str = Field(description="Of its first segment.")
    path: str
    duration: float = Field(description="In seconds after its first frame.")
    mtime: float = Field(description="Modification time, seconds since 1970.")

    @computed_field(description="Name of the file.")
    @property
    def name(self) -> str:
        """Name of the file."""
        return os.path.basename(self.path)


class Films(Answer):
    """Video files of the index, the newest first."""

    films: list[Film]


class Added(Answer):
    """A video that was received and will be indexed."""

    name: str = Field(description="Its name in the server's folder, never that of another file.")


class Failure(Answer):
    """A video that could not be indexed."""

    name: str
    reason: str


class Additions(Answer):
    """Names of the videos that were sent to the server."""

    waiting: list[str]
    running: str | None
    done: list[str] = Field(description="The last 100.")
    failed: list[Failure] = Field(description="The last 100.")


def read_answer(answer: results.Answer) -> dict[str, Any]:
    """Returns the fields of `Hits`."""
    facts = {"hits": answer.hits, "searched": answer.searched, "note": answer.note}
    facts["missing"] = answer.missing
    return facts | {"seconds": sum(answer.seconds.values()), "stages": answer.seconds}
