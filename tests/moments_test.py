"""Tests of moments: the run of frames around the best one, across segments and within filters."""

import numpy as np
import pytest

from xclip_jax.search.moments import Moment, MomentFinder, Piece, is_same_moment, smooth

EVERYWHERE = (-np.inf, np.inf)


def piece(values, *, start=0.0, step=1.0, path="a.mp4"):
    """Makes a segment with a frame at its start and every `step` seconds."""
    times = start + step * np.arange(len(values))
    return Piece(path, start, start + step * len(values), times, np.array(values, float))


def find(*pieces, **options):
    finder = MomentFinder(pieces, **{"interval": EVERYWHERE, **options})
    return [finder.find(index) for index in range(len(pieces))]


def test_moment_is_the_run_around_the_peak():
    # The level is (0.8 + 0) / 2; the frames at 1 s and 7 s reach it in other runs or not.
    (moment,) = find(piece([0.0, 0.3, 0.5, 0.8, 0.6, 0.1, 0.0, 0.7]))
    assert moment == Moment(1.5, 4.5, 3.0)


def test_moment_ends_halfway_to_the_background():
    values = [-0.6, 0.2, 0.5, 0.8, 0.2, -0.2]
    assert find(piece(values)) == [Moment(0.5, 4.5, 3.0)]  # the lowest is -0.6
    assert find(piece(values), background=0.0) == [Moment(1.5, 3.5, 3.0)]
    # All frames are above the background: two events of one film that are both similar.
    assert find(piece([0.8, 0.8, 0.5, 0.5]), background=0.1) == [Moment(0.0, 1.5, 0.0)]


def test_flat_curve_is_a_moment_of_one_segment():
    values = [0.70, 0.69, 0.72, 0.71, 0.68]
    first, second = piece(values), piece(values, start=5.0)
    assert find(first, second, background=0.1) == [Moment(0.0, 5.0, 2.0), Moment(5.0, 10.0, 7.0)]
    assert find(piece([0.5, 0.5])) == [Moment(0.0, 2.0, 0.0)]
    (moment,) = find(piece(values))  # without a background, any contrast counts
    assert moment.end - moment.start < 5


def test_moment_below_the_background_ends_halfway_to_the_lowest():
    assert find(piece([-0.6, 0.0, -0.1, -0.6]), background=0.3) == [Moment(0.5, 2.5, 1.0)]


def test_moment_has_a_greatest_length():
    values = np.full(1500, 0.8)
    values[:10] = 0.0
    values[800] = 0.9
    assert find(piece(values)) == [Moment(500.0, 1100.0, 800.0)]


def test_moment_reaches_into_adjacent_segments_of_the_same_film():
    first, second = piece([0, 0, 0.7, 0.8]), piece([0.9, 0.7, 0, 0], start=4.0)
    other = piece([0.9, 0.9, 0, 0], start=4.0, path="b.mp4")
    apart = piece([0.9, 0.9, 0, 0], start=9.0)
    moments = find(second, other, apart, first)
    assert moments[0] == Moment(1.5, 5.5, 4.0)
    assert moments[3] == Moment(1.5, 5.5, 3.0)
    assert moments[1] == Moment(4.0, 5.5, 4.0)
    assert moments[2] == Moment(9.0, 10.5, 9.0)


def test_frames_of_overlapping_segments_are_averaged():
    first, second = piece([0, 0, 0.2, 0.9]), piece([0.6, 0.9, 0.9, 0], start=2.0)
    moments = find(first, second)
    # Frame 2 has the mean 0.4, below the level of 0.45.
    assert moments[1] == Moment(2.5, 4.5, 3.0)


def test_filter_restricts_the_best_second_and_the_moment():
    values = [0.0, 0.9, 0.8, 0.7, 0.6, 0.0]
    assert find(piece(values), interval=(2.0, 3.5)) == [Moment(2.0, 3.5, 2.0)]
    # No frame is in it: the nearest one counts.
    assert find(piece(values), interval=(2.2, 2.4)) == [Moment(2.2, 2.4, 2.2)]


def test_frames_far_apart_cover_the_time_between_them():
    (moment,) = find(piece([0.0, 0.9, 0.0], step=10.0))
    assert moment == Moment(5.0, 15.0, 10.0)


def test_smoothing_weighs_real_neighbours_only():
    values = np.array([[1.0, 0.0, 4.0, 9.0]])
    mask = np.array([[True, True, True, False]])
    expected = [(2 * 1 + 0) / 3, (1 + 0 + 4) / 4, (0 + 2 * 4) / 3, 0]
    np.testing.assert_allclose(smooth(values, mask)[0], expected)
    np.testing.assert_allclose(smooth(values[:, :1], mask[:, :1]), [[1.0]])


@pytest.mark.parametrize(
    ("other", "second", "same"),
    [
        ((5.0, 9.0), 6.0, True),  # its best second is in the first
        ((7.0, 30.0), 20.0, False),
        ((3.0, 8.5), 8.2, True),  # nearly the same interval
        ((8.0, 9.0), 8.0, False),  # adjacent
        ((2.0, 2.0), 2.0, True),
    ],
)
def test_repeated_moments_are_known(other, second, same):
    assert is_same_moment((2.0, 8.0), other, second) == same
