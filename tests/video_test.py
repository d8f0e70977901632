"""Tests of reading videos: the chosen frames, streams, corrupted files."""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import av
import numpy as np
import pytest
from av.container import InputContainer
from av.stream import Disposition
from video_files import at_rate, grey, numbers, write

from xclip_jax.data import video
from xclip_jax.data.container import Clock, VideoError, _picture_streams
from xclip_jax.data.preprocess import FrameFormat


@pytest.mark.parametrize(
    ("rate", "chosen"),
    [
        (Fraction(10), [0, 10, 20, 30, 40]),
        (Fraction(12), [0, 12, 24, 36]),
        (Fraction(15, 2), [0, 7, 15, 22, 30, 37]),
        (Fraction(10000, 1001), [0, 9, 19, 29, 39]),
        (Fraction(1), list(range(41))),
        (Fraction(1, 2), [n // 2 for n in range(81)]),
    ],
)
def test_last_frame_by_each_second_is_read(tmp_path, rate, chosen):
    tick = 1 / (rate * 100)
    frames = video.read_frames(
        write(tmp_path / "a.mp4", at_rate(rate, 41), time_base=tick), FrameFormat(32)
    )
    assert numbers(frames) == chosen
    assert frames.times == pytest.approx([float(n / rate) for n in chosen], abs=1e-3)
    assert frames.note is None
    assert all(f.shape == (32, 32, 3) and f.dtype == np.uint8 for f in frames.frames)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi", ".mov"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_of_containers_with_b_frames_are_in_display_order(tmp_path, suffix, codec):
    options = {"bf": "2", "preset": "medium"} if codec == "libx264" else {"bf": "2", "b": "9000000"}
    times = at_rate(Fraction(10), 41)
    path = write(tmp_path / f"a{suffix}", times, None, codec, Fraction(1, 10), **options)
    assert numbers(video.read_frames(path, FrameFormat(32))) == [0, 10, 20, 30, 40]


def test_avi_keeps_gaps_although_its_presentation_times_jump(tmp_path):
    times = [Fraction(n, 10) for n in range(60) if n < 15 or n >= 38]  # 37 frames
    path = write(tmp_path / "a.avi", times, None, time_base=Fraction(1, 10), preset="medium")
    with av.open(str(path)) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert stamps != sorted(stamps)
    assert numbers(video.read_frames(path, FrameFormat(32))) == [0, 10, 14, 14, 17, 27]


def test_frames_are_repeated_in_long_gaps(tmp_path):
    times = [Fraction(t) for t in ("0", "0.4", "1.1", "3.5", "3.6", "6")]
    frames = video.read_frames(write(tmp_path / "a.mkv", times), FrameFormat(32))
    assert numbers(frames) == [0, 1, 2, 2, 4, 4, 5]
    assert frames.times == pytest.approx([0, 0.4, 1.1, 1.1, 3.6, 3.6, 6])


@pytest.mark.parametrize("suffix", [".ts", ".mkv"])
def test_times_count_from_the_first_frame(tmp_path, suffix):
    times = [Fraction("16.8") + t for t in at_rate(Fraction(10), 25)]
    frames = video.read_frames(write(tmp_path / f"a{suffix}", times), FrameFormat(32))
    assert numbers(frames) == [0, 10, 20]
    assert frames.times == [0, 1, 2]


@pytest.mark.parametrize(
    ("start", "end", "chosen"),
    [
        (0.0, 2.0, [0, 10, 20]),
        (0.3, 2.3, [3, 13, 23]),  # 0.3 is below 3/10 in floating point
        (0.35, 2.34, [3, 13]),
        (1.5, None, [15, 25, 35]),
        (None, 1.99, [0, 10]),
        (3.9, 9.0, [39]),
        (2.0, 2.0, [20]),
        (-1.0, 0.5, [0]),
    ],
)
def test_start_and_end_select_frames(tmp_path, start, end, chosen):
    path = write(tmp_path / "a.mp4", at_rate(Fraction(10), 40), time_base=Fraction(1, 10))
    frames = video.read_frames(path, FrameFormat(32), start=start, end=end)
    assert numbers(frames) == chosen
    assert frames.note is None


def test_no_frame_between_start_and_end_is_an_error(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(Fraction(10), 20))
    with pytest.raises(video.VideoError, match=r"^no frame between 3\.0 s and 5\.0 s$"):
        video.read_frames(path, FrameFormat(32), start=3.0, end=5.0)
    with pytest.raises(video.VideoError, match=r"^no frame between 3\.0 s and its end$"):
        video.read_frames(path, FrameFormat(32), start=3.0)
    with pytest.raises(video.VideoError, match="no frame between"):
        video.read_frames(path, FrameFormat(32), start=1.0, end=0.5)


def test_decoding_stops_after_the_end(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(Fraction(10), 50))
    reader = video.VideoReader(path, start=0.0, end=1.0)
    assert len(list(reader)) == 2
    assert reader.count == 12  # the frame at 1.1 s is the first after the end


@pytest.mark.parametrize(
    ("stamps", "ticks"),
    [
        ([100, 104, 108], [0, 4, 8]),
        ([None, None, None], [0, 4, 8]),
        ([None, 1680, 1684], [0, 4, 8]),
        ([0, None, 8], [0, 4, 8]),
        ([0, 12, 4, 8, 16], [0, 12, 12, 12, 16]),
        ([0, 30000, 30004], [0, 30000, 30004]),  # a pause of five minutes
        ([9000, 9004, 0, 4, 8], [0, 4, 8, 12, 16]),  # a recording appended that starts at 0
        ([0, 4, 2**33, 2**33 + 4], [0, 4, 8, 12]),
    ],
)
def test_clock_repairs_time_stamps(stamps, ticks):
    clock = Clock(second=Fraction(100), rate=Fraction(25))
    assert [clock(stamp) for stamp in stamps] == ticks


def test_truncated_file_gives_its_first_frames(tmp_path):
    path = write(tmp_path / "a.mkv", at_rate(Fraction(10), 50), g="10")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    frames = video.read_frames(path, FrameFormat(32))
    assert numbers(frames) == [0, 10, 20, 30][: len(frames.frames)]
    assert 2 <= len(frames.frames) <= 4
    path.write_bytes(data[:300])
    with pytest.raises(video.VideoError, match=r"^(no|cannot)"):
        video.read_frames(path, FrameFormat(32))


def test_missing_frames_are_noted(tmp_path):
    path = write(tmp_path / "a.avi", at_rate(Fraction(10), 50), time_base=Fraction(1, 10), g="10")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    frames = video.read_frames(path, FrameFormat(32))
    assert frames.note.startswith("far fewer frames than the header states (")
    assert frames.note.endswith(" of 50)")
    assert video.read_frames(path, FrameFormat(32), end=1.0).note is None


def test_decoding_error_keeps_earlier_frames(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(Fraction(10), 50), g="10", tune="zerolatency")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][30]
    data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    frames = video.read_frames(path, FrameFormat(32))
    assert numbers(frames) == [0, 10, 20]
    assert frames.note.startswith("decoder stopped at frame 30: Invalid data")
    assert video.read_frames(path, FrameFormat(32), end=2.0).note is None


def test_corrupted_packets_before_the_first_frame_are_skipped(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(Fraction(10), 50), g="10", tune="zerolatency")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in [packet for packet in container.demux(video=0) if packet.size][:10]:
            data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    frames = video.read_frames(path, FrameFormat(32))
    assert numbers(frames) == [10, 20, 30, 40]
    assert frames.times == [0, 1, 2, 3]
    assert frames.note == "far fewer frames than the header states (40 of 50)"


def test_undecodable_video_is_an_error(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(Fraction(10), 5))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in [packet for packet in container.demux(video=0) if packet.size]:
            data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    with pytest.raises(video.VideoError, match=r"^no frame could be decoded: Invalid data found"):
        video.read_frames(path, FrameFormat(32))


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.sample_rate = 16000
        container.mux(stream.encode(samples))
        container.mux(stream.encode(None))


def test_files_without_video_are_errors(tmp_path, capfd):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("Not found\n" * 100)
    write_audio(tmp_path / "audio.mp4")
    reasons = {
        "empty.mp4": r"^empty file \(0 bytes\)$",
        "text.mp4": "^cannot be opened: Invalid data",
        "audio.mp4": "^no video stream$",
        "missing.mp4": "^cannot be opened: No such file or directory$",
        ".": "^is a folder$",
    }
    for name, reason in reasons.items():
        with pytest.raises(video.VideoError, match=reason):
            video.read_frames(tmp_path / name, FrameFormat(32))
    assert capfd.readouterr().err == ""


def test_names_like_protocols_or_options_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.mp4", at_rate(Fraction(10), 11))
    for name in ("-v.mp4", "concat:b.mp4", "100%d.mp4", "x.mp4.", "\u00e9 @.mov"):
        Path(name).write_bytes(Path("a.mp4").read_bytes())
        assert numbers(video.read_frames(name, FrameFormat(32))) == [0, 10]


def test_cover_art_is_not_a_video_stream():
    cover = SimpleNamespace(disposition=Disposition.attached_pic | Disposition.default)
    container = Mock(spec=InputContainer, streams=SimpleNamespace(video=[cover]))
    with pytest.raises(VideoError, match=r"^no video stream$"):
        _picture_streams(container)
    unknown = SimpleNamespace(disposition=Disposition.default, codec_context=None)
    container.streams.video.append(unknown)
    with pytest.raises(video.VideoError, match=r"^no decoder for the video stream$"):
        _picture_streams(container)


def test_default_stream_is_read(tmp_path):
    for kinds, chosen in ((("", "default"), 11), (("", ""), 10)):
        path = tmp_path / "a.mp4"
        with av.open(str(path), "w") as container:
            streams = [container.add_stream("mjpeg", rate=10) for _ in kinds]
            for stream, kind in zip(streams, kinds, strict=True):
                stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
                stream.disposition = Disposition[kind] if kind else 0
            container.start_encoding()
            for number, stream in enumerate(streams):
                frame = av.VideoFrame.from_ndarray(grey(10 + number), "rgb24")
                container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
        assert numbers(video.read_frames(path, FrameFormat(32))) == [chosen]
