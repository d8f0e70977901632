"""What a search gives back."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Hit:
    """A segment found.

    Attributes:
        rank: from 1.
        score: the model's logit; for examples, see `Index.similar`.
        id: of the segment, 16 hexadecimal digits.
        path: its video file.
        start, end: of the segment, seconds after the file's first frame.
        second: the best one: that of the frame which AOSM weighs most for the query.
    """

    rank: int
    score: float
    id: str
    path: str
    start: float
    end: float
    second: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """Hits, the best first; iterates and indexes like the list of them.

    Attributes:
        hits: at most as many as asked for.
        seconds: what each stage took, by name.
        searched: how many segments the query was compared with.
        note: what the user should know of the query, such as that it was cut; or None.
    """

    hits: list[Hit]
    seconds: dict[str, float]
    searched: int
    note: str | None = None

    def __iter__(self):
        return iter(self.hits)

    def __len__(self):
        return len(self.hits)

    def __getitem__(self, index):
        return self.hits[index]


@dataclasses.dataclass(frozen=True)
class Attention:
    """How AOSM spreads its attention over a sentence's W words and a segment's F frames.

    Attributes:
        words: W tokens.
        times: F seconds after the file's first frame.
        weights_WxF: shares of the attention, summing to 1.
    """

    words: list[str]
    times: list[float]
    weights_WxF: np.ndarray
