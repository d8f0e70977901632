"""Tests of frames that are spread over a whole video."""

from fractions import Fraction

import numpy as np
import pytest
import video_files

from xclip_jax.data.pipeline import choose_frames
from xclip_jax.data.preprocess import FrameFormat
from xclip_jax.data.video import VideoReader, read_frames
from xclip_jax.search.segments import SegmentJob, load_frames, read_segments


@pytest.mark.parametrize(
    ("count", "spread", "expected"),
    [(16, 4, [0, 4, 8, 12]), (10, 4, [0, 2, 5, 7]), (3, 4, [0, 0, 1, 2]), (1, 3, [0, 0, 0])],
)
def test_spread_frames_start_equal_parts_of_the_video(tmp_path, count, spread, expected):
    path = video_files.write(tmp_path / "a.mp4", video_files.at_rate(25, count))
    frames = read_frames(path, FrameFormat(32, spread=spread))
    assert video_files.numbers(frames) == expected
    assert choose_frames(count, spread, spread=True).tolist() == expected
    assert frames.times == pytest.approx([number / 25 for number in expected])


def test_spread_frames_of_a_part_lie_within_it(tmp_path):
    path = video_files.write(tmp_path / "a.mp4", video_files.at_rate(25, 40))
    frames = read_frames(path, FrameFormat(32, spread=4), start=0.4, end=1.2)
    assert video_files.numbers(frames) == [10, 15, 20, 25]
    past = read_frames(path, FrameFormat(32, spread=4), start=1.28, end=60.0)
    assert video_files.numbers(past) == [32, 34, 36, 38]
    single = read_frames(path, FrameFormat(32, spread=3), start=0.4, end=0.4)
    assert video_files.numbers(single) == [10, 10, 10]


def test_times_past_the_end_show_the_last_picture(tmp_path):
    path = video_files.write(tmp_path / "a.mp4", video_files.at_rate(10, 20))
    times = [Fraction(1, 2), Fraction(1, 2), Fraction(19, 10), Fraction(9)]
    seen = [time for time, _ in VideoReader(path, times=times)]
    assert seen == pytest.approx([0.5, 0.5, 1.9, 1.9])


def test_segments_have_the_frames_that_a_model_is_given_of_their_part(tmp_path):
    path = video_files.write(tmp_path / "a.mp4", video_files.at_rate(25, 44))
    job = SegmentJob(str(path), tmp_path / "frames", FrameFormat(32, spread=4), 4, 1)
    cut, note, _ = read_segments(job)
    assert note is None
    assert [(s.start, s.end) for s in cut] == [(0, 1), (1, pytest.approx(1.76))]
    for segment, frames in zip(cut, load_frames(job, cut), strict=True):
        one = read_frames(path, job.format, start=segment.start, end=segment.end)
        np.testing.assert_array_equal(frames, one.frames)
        length = segment.end - segment.start
        starts = [segment.start + k * length / 4 for k in range(4)]
        assert segment.times == pytest.approx(starts)
