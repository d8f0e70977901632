"""Selects the segments of an index that are searched."""

import dataclasses
from typing import TypedDict

import numpy as np

from xclip_jax.search.vectors import Rows

MAX_PATH = 4096  # characters of a path filter


class Filters(TypedDict, total=False):
    """Conditions that restrict a search to some segments, where None means no restriction."""

    # Part of the path; with the wildcards `*` (any characters) and `?` (any one), a pattern of the
    # end of the path, or of the whole path if it begins with `/`.
    path: str | None
    # Seconds; the segment must overlap this interval of its file, and its best second is in it.
    start: float | None
    end: float | None


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows that pass `Filters`, and of these only some, or all but some."""

    path: str | None = None
    start: float | None = None
    end: float | None = None
    only: Rows | None = None  # row ids; None: all
    without: Rows | None = None  # row ids

    @property
    def filters(self) -> tuple[str | None, float | None, float | None]:
        """The path and the seconds."""
        return self.path or None, self.start, self.end

    @property
    def interval(self) -> tuple[float, float]:
        """Seconds of a file in which moments must be."""
        start = -np.inf if self.start is None else self.start
        return start, np.inf if self.end is None else self.end

    @property
    def is_everything(self) -> bool:
        """True if every row of the index is selected."""
        return self.filters == (None, None, None) and self.only is None and self.without is None


EVERYTHING = Selection()
