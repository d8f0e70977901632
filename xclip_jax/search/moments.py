"""Finds the moment of a sentence in a film: the run of similar frames around the best one.

Frame-sentence similarities (Eq. 5) are used, not AOSM's weights, which fall to zero beside the best
frame.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

_KERNEL = (0.25, 0.5, 0.25)
MAX_SECONDS = 600.0  # of a moment
MIN_CONTRAST = 0.25  # of the height of the peak above unrelated frames
OVERLAP = 0.5  # intersection over union from which two moments are the same
Curves = Float[np.ndarray, "n F"]
FrameMask = Bool[np.ndarray, "n F"]
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A segment whose frames were compared with a sentence. Times are seconds in its film."""

    path: str
    start: float
    end: float
    times: Float[np.ndarray, " f"]  # of its real frames
    similarities: Float[np.ndarray, " f"]  # smoothed, see `smooth`


@dataclasses.dataclass(frozen=True)
class Moment:
    """A part of a film and its best second."""

    start: float
    end: float
    second: float


def smooth(similarities_nxF: Curves, mask_nxF: FrameMask) -> Curves:
    """Returns the means of each frame and its real neighbours, weighted 1:2:1, 0 where masked."""
    padded = np.pad(similarities_nxF * mask_nxF, ((0, 0), (1, 1)))
    counted = np.pad(mask_nxF.astype(np.float32), ((0, 0), (1, 1)))
    width = mask_nxF.shape[1]
    total, weight = (
        sum(share * values[:, k : k + width] for k, share in enumerate(_KERNEL))
        for values in (padded, counted)
    )
    return np.where(mask_nxF, total / np.maximum(weight, 0.25), 0)


class MomentFinder:
    """Finds the moments of segments: the run of frames around the best one of each.

    The run ends where the similarity falls below the mean of the peak and the background, or of
    the peak and the lowest of the adjacent segments if that is higher. It may reach into adjacent
    segments, at most MAX_SECONDS / 2 from the best second. Where the curve is flat, compared with
    the height of the peak, the moment is the segment.

    Args:
        pieces: n segments.
        interval: seconds of a film, to which best seconds and moments are restricted.
        background: similarity of unrelated sentences and frames; None: unknown.
    """

    def __init__(
        self, pieces: Sequence[Piece], *, interval: Interval, background: float | None = None
    ) -> None:
        self._pieces, self._interval, self._background = pieces, interval, background
        self._chains = {k: chain for chain in _chains(pieces) for k in chain}
        self._curves: dict[int, _Curve] = {}  # by the first segment of the chain

    def find(self, index: int) -> Moment:
        """Returns the moment of a segment."""
        piece, chain = self._pieces[index], self._chains[index]
        curve = self._curves.get(chain[0])
        if curve is None:
            curve = self._curves[chain[0]] = _join([self._pieces[k] for k in chain])
        second = _best_second(piece, self._interval)
        peak = int(np.searchsorted(curve.times, second))
        level = _level(curve.values[peak], curve.lowest, self._background)
        start, end = piece.start, piece.end
        if level is not None:
            start, end = (curve.edges[place] for place in _run(curve.values < level, peak))
        start, end = max(start, second - MAX_SECONDS / 2), min(end, second + MAX_SECONDS / 2)
        low, high = self._interval
        return Moment(*(float(min(max(time, low), high)) for time in (start, end, second)))


class _Curve(NamedTuple):
    """The similarities of the frames of adjacent segments, in order."""

    times: Float[np.ndarray, " f"]
    values: Float[np.ndarray, " f"]
    edges: list[float]  # f + 1 times, between which each frame is shown
    lowest: float


def _join(pieces: Sequence[Piece]) -> _Curve:
    times = np.concatenate([piece.times for piece in pieces])
    values = np.concatenate([piece.similarities for piece in pieces])
    times, inverse = np.unique(times, return_inverse=True)  # overlapping segments
    values = np.bincount(inverse, values) / np.bincount(inverse)
    middles = (times[1:] + times[:-1]) / 2
    edges = [pieces[0].start, *middles.tolist(), max(piece.end for piece in pieces)]
    return _Curve(times, values, edges, float(values.min()))


def _chains(pieces: Sequence[Piece]) -> Iterator[list[int]]:
    """Yields the indices of segments that follow each other in a film, in order."""
    order = sorted(range(len(pieces)), key=lambda k: (pieces[k].path, pieces[k].start))
    chain: list[int] = []
    for k in order:
        last = pieces[chain[-1]] if chain else None
        if last and (last.path != pieces[k].path or pieces[k].start > last.end):
            yield chain
            chain = []
        chain.append(k)
    if chain:
        yield chain


def _best_second(piece: Piece, interval: Interval) -> float:
    """Returns the time of the best frame in the interval, or of the one nearest to it."""
    distances = abs(piece.times - np.clip(piece.times, *interval))
    values = np.where(distances == distances.min(), piece.similarities, -np.inf)
    return float(piece.times[values.argmax()])


def _level(peak: float, lowest: float, background: float | None) -> float | None:
    """Returns the similarity at which a moment ends, None if the curve is flat."""
    base = lowest if background is None or background >= peak else background
    if peak - lowest <= MIN_CONTRAST * (peak - base):
        return None
    return (peak + max(lowest, base)) / 2


def _run(below: Bool[np.ndarray, " f"], place: int) -> tuple[int, int]:
    """Returns the first and the last + 1 index of the run of False around `place`."""
    ends = np.flatnonzero(below)
    index = int(np.searchsorted(ends, place))
    first = int(ends[index - 1]) + 1 if index else 0
    return first, int(ends[index]) if index < len(ends) else len(below)


def is_same_moment(one: Interval, other: Interval, second: float) -> bool:
    """Returns True if `other`, with this best second, repeats `one` of the same film."""
    if one[0] <= second < one[1] or one[0] == second:
        return True
    common = min(one[1], other[1]) - max(one[0], other[0])
    return common > OVERLAP * (max(one[1], other[1]) - min(one[0], other[0]))
