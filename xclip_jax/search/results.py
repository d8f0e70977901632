"""Results of a search: hits, each a moment of a film, and why it was found."""

import dataclasses
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

Source = Literal["picture", "speech", "text"]  # what is seen, said, and written on screen
SOURCES: tuple[Source, ...] = get_args(Source)


@dataclasses.dataclass(frozen=True)
class Match:
    """A source in which a hit was found. All times are seconds after the file's first frame."""

    source: Source
    score: float  # picture: the model's logit; speech and text: BM25 of the passage
    start: float
    end: float
    text: str = ""  # the lines that are said or written from `start` to `end`


@dataclasses.dataclass(frozen=True)
class Hit:
    """A moment in the results of a search. All times are seconds after the file's first frame."""

    rank: int  # position in the results, from 1
    score: float | None  # the model's logit, see `Index.similar`; None: pictures not searched
    id: str  # of the segment that holds the best second, 16 hexadecimal digits
    path: str  # of its video file
    start: float  # of the moment, which may reach into neighbouring segments
    end: float
    second: float  # the best second of the moment
    segment_start: float
    segment_end: float
    duration: float  # end of the last segment of the file
    offset: float = 0.0  # from the start of the file, as players count, to its first frame
    bias: float = 0.0  # hubness bias as a logit: results are ranked by score - bias
    weak: bool = False  # True: score - bias is below the calibrated threshold, no text matches
    matches: tuple[Match, ...] = ()  # best source first
    duplicates: tuple["Hit", ...] = ()  # near-duplicates that are folded into this hit


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of a search, usable like a list of Hit."""

    hits: list[Hit]  # at most k, best first
    seconds: dict[str, float]  # time of each stage, by its name
    searched: int  # number of segments that passed the filters
    note: str | None = None  # for the user, e.g. that the sentence was truncated
    missing: int = 0  # number of parts of a sharded index that did not answer

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, index: int) -> Hit:
        return self.hits[index]


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Similarities of a sentence and of its W words to the F frames of a segment, as cosines.

    The best second of a hit in this segment is the time of the frame where `sentence` is largest.
    """

    words: list[str]  # W words; empty if the model does not compare words with frames
    times: list[float]  # F seconds after the file's first frame
    words_WxF: Float[np.ndarray, "W F"]  # mean over the tokens of a word
    sentence: list[float]  # F similarities of the whole sentence, smoothed over neighbours


@dataclasses.dataclass(frozen=True)
class Film:
    """A video file of the index."""

    id: str  # of its first segment
    path: str
    duration: float  # end of its last segment, in seconds after its first frame
    mtime: float  # modification time, seconds since 1970


def format_time(seconds: float) -> str:
    """Returns seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
