"""Tests of reading the sound of a film."""

import av
import numpy as np
import pytest
from video_files import at_rate, write
from whisper_files import beeps, write_film

from xclip_jax.data import sound
from xclip_jax.data.container import VideoError
from xclip_jax.data.sound import RATE, read_sound


def loud_seconds(pieces):
    """Returns the seconds at which the sound becomes loud and silent, within 0.05 s."""
    edges = []
    for piece in pieces:
        blocks = piece.samples[: len(piece.samples) // 800 * 800].reshape(-1, 800)
        is_loud = (np.abs(blocks).max(1) > 0.2).astype(int)
        edges += [piece.start + k / 20 for k in np.flatnonzero(np.diff(is_loud, prepend=0))]
    return edges


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.mp4", "aac", 48_000), ("a.mkv", "flac", 22_050), ("a.mkv", "pcm_s16le", 16_000)],
)
def test_sound_is_read_at_one_rate_with_its_times(tmp_path, name, codec, rate):
    samples = beeps(6, rate, loud=[(1, 2), (4, 4.5)])
    path = write_film(tmp_path / name, samples, rate=rate, codec=codec)
    (piece,) = read_sound(path)
    assert piece.start == pytest.approx(0, abs=0.05)
    assert len(piece.samples) == pytest.approx(6 * RATE, abs=0.1 * RATE)
    assert piece.samples.dtype == np.float32
    assert loud_seconds([piece]) == pytest.approx([1, 2, 4, 4.5], abs=0.11)


def test_times_count_from_the_first_frame(tmp_path):
    samples = beeps(6, loud=[(1, 2)])
    path = write_film(tmp_path / "a.mkv", samples, codec="pcm_s16le", sound_start=3.0)
    assert loud_seconds(read_sound(path)) == pytest.approx([4, 5], abs=0.11)
    path = write_film(tmp_path / "b.mkv", samples, codec="flac", video_start=2.5)
    assert loud_seconds(read_sound(path)) == pytest.approx([-1.5, -0.5], abs=0.11)


def test_film_without_sound_has_no_pieces(tmp_path):
    assert list(read_sound(write(tmp_path / "a.mp4", at_rate(1, 3)))) == []


def test_default_track_is_read(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=1)
        video.width = video.height = 32
        tracks = [container.add_stream("pcm_s16le", rate=RATE, layout="mono") for _ in range(2)]
        tracks[0].disposition, tracks[1].disposition = 0, av.stream.Disposition.default
        for _ in range(3):
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(video.encode(picture))
            for number, track in enumerate(tracks):
                values = np.full((1, RATE), 10_000 * number, np.int16)
                frame = av.AudioFrame.from_ndarray(values, format="s16", layout="mono")
                frame.sample_rate = RATE
                container.mux(track.encode(frame))
        container.mux(video.encode(None))
    (piece,) = read_sound(path)
    assert piece.samples.mean() == pytest.approx(10_000 / 32_768, abs=1e-3)


def test_long_sound_is_cut_where_it_is_quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(sound, "PIECE_SECONDS", 4)
    monkeypatch.setattr(sound, "_CUT_SECONDS", 2)
    samples = beeps(10, loud=[(0.5, 2.5), (2.8, 6), (6.3, 10)])
    pieces = list(read_sound(write_film(tmp_path / "a.mkv", samples, codec="flac")))
    starts = [piece.start for piece in pieces]
    assert starts[0] == 0
    assert 2.5 < starts[1] < 2.8
    assert 6 < starts[2] < 6.3
    np.testing.assert_allclose(np.concatenate([p.samples for p in pieces]), samples, atol=1e-3)
    ends = [piece.start + len(piece.samples) / RATE for piece in pieces]
    assert starts[1:] == pytest.approx(ends[:-1])


@pytest.mark.parametrize(("gap", "count"), [(0.05, 1), (3, 1), (20, 2)])
def test_gaps_in_the_time_stamps_keep_the_times(tmp_path, gap, count):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=1)
        video.width = video.height = 32
        track = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(video.encode(picture))
        for start in (0, 1 + gap):
            values = (beeps(1, loud=[(0.2, 0.4)]) * 32_767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(values, format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, round(start * RATE)
            container.mux(track.encode(frame))
        container.mux(video.encode(None))
    pieces = list(read_sound(path))
    assert len(pieces) == count
    expected = [0.2, 0.4, 1.2 + gap, 1.4 + gap]
    assert loud_seconds(pieces) == pytest.approx(expected, abs=0.11)


def test_playlist_is_refused(tmp_path):
    write_film(tmp_path / "other.mp4", beeps(2))
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    with pytest.raises(VideoError, match="cannot be opened"):
        list(read_sound(tmp_path / "a.mp4"))


def test_truncated_file_is_read_up_to_its_end(tmp_path):
    path = write_film(tmp_path / "a.mkv", beeps(20, loud=[(1, 2)]), codec="pcm_s16le")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert loud_seconds(read_sound(path))[:2] == pytest.approx([1, 2], abs=0.11)


def test_sound_that_would_be_expanded_without_limit_is_refused(tmp_path):
    path = write_film(tmp_path / "a.mkv", beeps(2, 1000), rate=1000, codec="pcm_s16le")
    with pytest.raises(VideoError, match="the sound has 1000 samples a second"):
        list(read_sound(path))


def test_sound_of_more_than_a_day_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sound, "MAX_SECONDS", 3)
    path = write_film(tmp_path / "a.mkv", beeps(10), codec="flac")
    assert sum(len(p.samples) for p in read_sound(path)) == pytest.approx(3 * RATE, abs=RATE / 2)
