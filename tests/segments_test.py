"""Tests of splitting videos into segments."""

import io
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from video_files import at_rate, corners, grey, write

from xclip_jax.data import video
from xclip_jax.data.preprocess import FrameFormat
from xclip_jax.search.segments import SegmentJob, _cut, load_frames, read_segments

FORMAT = FrameFormat(32)


def read(tmp_path, path, seconds=4, max_frames=100, shots=False, format=FORMAT):
    job = SegmentJob(str(path), tmp_path / "frames", format, max_frames, seconds, shots)
    return job, read_segments(job)


def spans(cut):
    return [(segment.start, segment.end) for segment in cut]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (3, [(0, 3)]),
        (4, [(0, 4)]),
        (5, [(0, 5)]),  # a remainder of less than half is merged
        (6, [(0, 4), (4, 6)]),
        (9, [(0, 4), (4, 9)]),
        (12, [(0, 4), (4, 8), (8, 12)]),
    ],
)
def test_videos_are_split_into_segments_of_the_given_length(tmp_path, length, expected):
    path = write(tmp_path / "a.mp4", at_rate(2, 2 * length), [grey(0)] * 2 * length)
    _, (cut, problem, _) = read(tmp_path, path)
    for actual, span in zip(spans(cut), expected, strict=True):
        assert actual == pytest.approx(span, abs=0.1)
    assert problem is None


def test_frames_and_times_equal_those_of_the_video_reader(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(1, 12))
    job, (cut, *_) = read(tmp_path, path, max_frames=3)
    every_second = video.read_frames(path, FrameFormat(32)).frames
    loaded = list(load_frames(job, cut))
    assert [segment.times for segment in cut] == [[0, 1, 3], [4, 5, 7], [8, 9, 11]]
    for segment, frames in zip(cut, loaded, strict=True):
        np.testing.assert_array_equal(
            frames, [every_second[int(second)] for second in segment.times]
        )


def test_frames_have_the_format_of_the_model(tmp_path):
    path, format = write(tmp_path / "a.mp4", [Fraction(0)], [corners()]), FrameFormat(24, "squash")
    job, (cut, *_) = read(tmp_path, path, format=format)
    (frames,) = load_frames(job, cut)
    np.testing.assert_array_equal(frames, video.read_frames(path, format).frames)
    assert not np.array_equal(frames, video.read_frames(path, FrameFormat(24)).frames)


def test_frame_shown_across_a_boundary_is_in_both_segments(tmp_path):
    path = write(tmp_path / "a.mkv", [0, 1, 2, 6.5, 7, 8])
    job, (cut, *_) = read(tmp_path, path)
    second = list(load_frames(job, cut))[1]
    assert spans(cut)[1][0] == 4
    assert cut[1].times == [4, 5, 6, 7, 8]
    assert [round((frame.mean() - 20) / 4) for frame in second] == [2, 2, 2, 4, 5]


def test_thumbnail_is_an_uncropped_frame_near_the_middle(tmp_path):
    pictures = [corners(360, 640) if second in (4, 8) else grey(0) for second in range(12)]
    pictures = [np.resize(p, (360, 640, 3)) if p.shape[0] != 360 else p for p in pictures]
    path = write(tmp_path / "a.mp4", at_rate(1, 12), pictures)
    _, (cut, *_) = read(tmp_path, path, seconds=30)
    image = np.asarray(Image.open(io.BytesIO(cut[0].thumbnail)))
    assert image.shape == (180, 320, 3)
    assert image[10, 10].tolist() == pytest.approx([255, 0, 0], abs=12)
    assert image[-10, -10].tolist() == pytest.approx([255, 255, 255], abs=12)


def test_segments_end_at_shot_changes(tmp_path):
    pytest.importorskip("scenedetect")
    rng = np.random.default_rng(0)
    shots = [rng.integers(0, 255, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1) for _ in range(3)]
    pictures = [shots[int(t >= 3.4) + int(t >= 8)] for t in np.arange(0, 14, 0.2)]
    path = write(tmp_path / "a.mp4", at_rate(5, len(pictures)), pictures)
    _, (cut, *_) = read(tmp_path, path, seconds=30, shots=True)
    starts = [segment.start for segment in cut]
    assert starts == pytest.approx([0, 3.4, 8], abs=0.05)
    assert [segment.times[0] for segment in cut] == [0, 4, 8]
    _, (cut, *_) = read(tmp_path, path, seconds=4, shots=True)
    assert [round(segment.start) for segment in cut] == [0, 3, 8, 12]


def test_playlist_is_refused_before_shots_are_detected(tmp_path):
    pytest.importorskip("scenedetect")
    write(tmp_path / "other.mp4", at_rate(5, 20))
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    _, (cut, problem, _) = read(tmp_path, tmp_path / "a.mp4", shots=True)
    assert cut == []
    assert problem.startswith("cannot be opened: ")


def test_shot_of_less_than_two_frames_is_merged_with_the_previous_one():
    class Reader:
        def __iter__(self):
            picture = video.Picture(Image.new("RGB", (8, 8)), Fraction(1))
            yield from ((float(second), picture) for second in range(9))

    pieces = _cut(Reader(), FrameFormat(8), (30, 0), [3.5, 4.2, 5.0, 7.1])
    cut = [(start, len(frames)) for start, *_, frames in pieces]
    assert cut == [(0.0, 4), (3.5, 4), (7.1, 1)]


def test_unreadable_file_has_a_reason(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "garbage.mp4").write_bytes(bytes(range(256)) * 50)
    for name, expected in (("empty", "0 bytes"), ("garbage", ""), ("gone", "cannot be opened")):
        _, (cut, problem, _) = read(tmp_path, tmp_path / f"{name}.mp4")
        assert cut == []
        assert problem
        assert expected in problem


def test_truncated_file_is_used_with_a_note(tmp_path):
    path = write(tmp_path / "a.avi", at_rate(10, 50), time_base=Fraction(1, 10), g="10")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    _, (cut, problem, _) = read(tmp_path, path)
    assert "fewer frames" in problem
    assert 2 <= len(cut[0].times) <= 4


def test_still_is_the_frame_at_the_given_second(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(5, 45), g="10")
    for second in (0, 1, 4.2, 8.8, 100):
        image = np.asarray(Image.open(io.BytesIO(video.read_still(path, second))))
        assert round((image.mean() - 20) / 4) == min(round(second * 5), 44)


def test_still_at_an_invalid_second_is_an_error(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(5, 10))
    with pytest.raises(video.VideoError, match="no picture"):
        video.read_still(path, 1e300)
