"""Tests of timed text and its assignment to segments."""

import math

import pytest

from xclip_jax.search.lines import (
    MAX_CHARACTERS,
    Line,
    fill_lengths,
    make_line,
    sort_lines,
    split_lines,
)


def test_line_is_cleaned():
    assert make_line(-1, 2, " a\n b\u0000 \t e\u0301 ") == Line(0, 2, "a b é")
    assert make_line(-3, -2, "a") == Line(0, 0, "a")
    assert make_line(5, 2, "a") == Line(5, 5, "a")
    assert make_line(1, 2, "\ud800a").text.encode() == b"a"


@pytest.mark.parametrize(
    ("start", "end", "text"),
    [(0, 1, " \n"), (0, 1, "\u0000"), (math.nan, 1, "a"), (0, math.inf, "a"), (0, 1e9, "a")],
)
def test_empty_text_and_invalid_times_are_no_line(start, end, text):
    assert make_line(start, end, text) is None


def test_long_text_is_cut():
    assert make_line(0, 1, "a" * 10**7).text == "a" * MAX_CHARACTERS


@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        ([1.0, 3.0], [3.0, 6.0]),  # until the next one, the last for three seconds
        ([1.0, 9.0], [4.0, 12.0]),  # at most three seconds
        ([1.0, 1.1], [1.5, 4.1]),  # at least half a second
        ([2.0, 2.0, 4.0], [4.0, 4.0, 7.0]),  # at once: until one that starts later
        ([4.0, 2.0], [7.0, 4.0]),  # in any order
    ],
)
def test_line_without_length_lasts_until_the_next_one(starts, ends):
    lines = fill_lengths(Line(start, start, "a") for start in starts)
    assert lines == [Line(start, end, "a") for start, end in zip(starts, ends, strict=True)]


def test_lines_with_a_length_keep_it():
    lines = [Line(1, 1.01, "a"), Line(1.2, 60, "b")]
    assert fill_lengths(lines) == lines


def test_lines_are_sorted_and_unique():
    lines = [Line(2, 3, "b"), Line(1, 2, "a"), Line(2, 3, "b"), Line(2, 3, "a")]
    assert sort_lines(lines) == [Line(1, 2, "a"), Line(2, 3, "a"), Line(2, 3, "b")]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (1, 2, [0]),
        (29, 31, [0, 1]),  # a second in each
        (29, 40, [0, 1]),
        (29.9, 31, [1]),  # 0.1 s
        (29.8, 30.2, [0, 1]),  # half of it in each
        (29.9, 30.2, [1]),
        (10, 100, [0, 1, 2]),
        (30, 30, [1]),  # without length
        (89.9, 95, [2]),  # nothing enough: the one with the most
        (95, 96, []),
        (90, 90, []),
    ],
)
def test_line_belongs_to_the_segments_it_overlaps(start, end, expected):
    line = Line(start, end, "a")
    result = split_lines([line], [(0, 30), (30, 60), (60, 90)])
    assert [index for index, lines in enumerate(result) if lines] == expected


def test_line_across_many_short_segments_belongs_to_the_one_it_overlaps_most():
    result = split_lines([Line(0.05, 0.95, "a")], [(0, 0.3), (0.3, 0.6), (0.6, 1)])
    assert [len(lines) for lines in result] == [0, 0, 1]


def test_overlapping_segments_both_have_a_line():
    lines = [Line(11, 12, "a"), Line(19.55, 20.35, "b"), Line(25, 26, "c")]
    assert split_lines(lines, [(0, 20), (10, 30), (20, 40)]) == [lines[:2], lines, lines[2:]]
    short = [Line(19.65, 20.35, "a"), Line(19.3, 20.1, "b")]  # half in both, a tenth in the last
    assert split_lines(short, [(0, 20), (10, 30), (20, 40)]) == [short, short, short[:1]]


def test_no_segments_have_no_lines():
    assert split_lines([Line(0, 1, "a")], []) == []
