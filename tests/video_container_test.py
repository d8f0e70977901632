"""Tests of containers: joined recordings, held pictures, late pictures, edit lists, playlists."""

import io
import struct
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from video_files import at_rate, grey, numbers, write

from xclip_jax.data import video
from xclip_jax.data.container import VideoError
from xclip_jax.data.preprocess import FrameFormat

RED, BLUE, GREEN = (220, 30, 30), (30, 40, 220), (30, 200, 40)
TENTH = Fraction(1, 10)


def filled(colour, size=64):
    return np.full((size, size, 3), colour, np.uint8)


def recording(path, colour, seconds, start=0, rate=25):
    """Writes a recording of one colour whose clock begins at `start` seconds."""
    times = [start + time for time in at_rate(Fraction(rate), round(rate * seconds))]
    codec = "mpeg2video" if path.suffix == ".mpg" else "libx264"
    codec = "flv1" if path.suffix == ".flv" else codec
    write(path, times, [filled(colour)] * len(times), codec, Fraction(1, rate), g="12")
    return path.read_bytes()


def colours(pictures):
    names = {"red": RED, "blue": BLUE, "green": GREEN}

    def nearest(picture):
        mean = np.asarray(picture, float).reshape(-1, 3).mean(0)
        return min(names, key=lambda name: np.sum((mean - names[name]) ** 2))

    return [nearest(picture) for picture in pictures]


def still(path, second):
    return Image.open(io.BytesIO(video.read_still(path, second))).convert("RGB")


@pytest.mark.parametrize("suffix", [".ts", ".mpg", ".flv"])
def test_all_parts_of_joined_recordings_are_read(tmp_path, suffix):
    parts = [(RED, 3), (BLUE, 2), (GREEN, 4)]
    joined = tmp_path / f"joined{suffix}"
    part = tmp_path / f"part{suffix}"
    joined.write_bytes(b"".join(recording(part, colour, seconds) for colour, seconds in parts))
    frames = video.read_frames(joined, FrameFormat(32))
    expected = ["red"] * 3 + ["blue"] * 2 + ["green"] * 4
    assert colours(frames.frames) == expected
    assert frames.note is None
    stills = [still(joined, second + 0.5) for second in range(9)]
    assert colours(stills) == expected


def test_step_back_of_less_than_ten_seconds_is_a_restart(tmp_path):
    data = recording(tmp_path / "a.ts", RED, 3, start=100) + recording(
        tmp_path / "b.ts", BLUE, 3, start=97
    )
    path = tmp_path / "joined.ts"
    path.write_bytes(data)
    assert colours(video.read_frames(path, FrameFormat(32)).frames) == ["red"] * 3 + ["blue"] * 3


@pytest.mark.parametrize("jump", [15, 1800])
def test_jump_of_the_clock_is_no_pause_in_a_recording(tmp_path, jump):
    parts = [recording(tmp_path / "a.ts", RED, 6), recording(tmp_path / "b.ts", BLUE, 6, 6 + jump)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    frames = video.read_frames(path, FrameFormat(32))
    assert colours(frames.frames) == ["red"] * 6 + ["blue"] * 6
    assert colours([still(path, 8)]) == ["blue"]


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".ts", ".mp4", ".avi"])
@pytest.mark.parametrize("held", [4, 13])
def test_held_picture_is_read_and_shown_until_the_next(tmp_path, suffix, held):
    codec = "libvpx" if suffix == ".webm" else "libx264"
    times = [Fraction(held * number) for number in range(4)]
    path = write(tmp_path / f"a{suffix}", times, codec=codec, g="1")
    frames = video.read_frames(path, FrameFormat(32))
    assert numbers(frames) == [*np.repeat([0, 1, 2], held), 3]
    shown = [round((np.asarray(still(path, k)).mean() - 20) / 4) for k in range(3 * held + 1)]
    assert shown == numbers(frames)


def write_with_sound(path, times, seconds, **options):
    """Writes grey frames at `times`, in seconds, and silence of `seconds`."""
    codec = "flv1" if path.suffix == ".flv" else "libx264"
    with av.open(str(path), "w", options=options) as container:
        picture = container.add_stream(codec, rate=25)
        picture.width, picture.height, picture.pix_fmt = 96, 64, "yuv420p"
        picture.bit_rate = 2_000_000
        sound = container.add_stream("mp2" if path.suffix != ".flv" else "mp3", rate=44100)
        packets = []
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(grey(number % 50), format="rgb24")
            frame.pts, frame.time_base = round(25 * time), Fraction(1, 25)
            packets += picture.encode(frame)
        packets += picture.encode(None)
        for number in range(round(seconds * 44100 / 1152)):
            samples = np.zeros((sound.layout.nb_channels, 1152), np.int16)
            frame = av.AudioFrame.from_ndarray(samples, "s16p", sound.layout.name)
            frame.rate, frame.pts = 44100, 1152 * number
            packets += sound.encode(frame)
        packets += sound.encode(None)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            container.mux(packet)
    return path


@pytest.mark.parametrize("suffix", [".ts", ".flv"])
def test_picture_is_held_while_the_sound_goes_on(tmp_path, suffix):
    times = [*at_rate(25, 50), *(17 + time for time in at_rate(25, 25))]
    path = write_with_sound(tmp_path / f"a{suffix}", times, 18)
    reader = video.VideoReader(path)
    assert len(list(reader)) in (18, 19)
    assert reader.end == pytest.approx(18, abs=0.3)
    held, after = (np.asarray(still(path, second)).mean() for second in (10, 17.5))
    assert abs(held - grey(49).mean()) < 3 < abs(after - held)


def test_recording_with_other_streams_is_read_or_said(tmp_path):
    """The first part has other stream numbers (PID), the second also another programme (PMT)."""
    parts = [write_with_sound(tmp_path / "a.ts", at_rate(25, 75), 3).read_bytes()]
    for options in ({"mpegts_start_pid": "768"}, {"mpegts_pmt_start_pid": "4608"}):
        pids = {"mpegts_start_pid": "768"} | options
        other = write_with_sound(tmp_path / "b.ts", at_rate(25, 75), 3, **pids).read_bytes()
        (tmp_path / "joined.ts").write_bytes(parts[0] + other)
        reader = video.VideoReader(tmp_path / "joined.ts")
        count = len(list(reader))
        if "mpegts_pmt_start_pid" in options:
            assert count == 3
            assert reader.note.startswith("the last 50% of the file is another recording")
        else:
            assert (count, reader.note) == (6, None)


def test_matroska_files_joined_byte_by_byte_are_read(tmp_path):
    parts = [recording(tmp_path / "a.mkv", colour, 3) for colour in (RED, BLUE)]
    (tmp_path / "joined.mkv").write_bytes(b"".join(parts))
    frames = video.read_frames(tmp_path / "joined.mkv", FrameFormat(32))
    assert colours(frames.frames) == ["red"] * 3 + ["blue"] * 3


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_truncated_matroska_file_has_a_note(tmp_path, suffix):
    codec = "libvpx" if suffix == ".webm" else "libx264"
    path = write(
        tmp_path / f"a{suffix}", at_rate(10, 100), [grey(n % 50) for n in range(100)], codec
    )
    assert video.read_frames(path, FrameFormat(32)).note is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    note = video.read_frames(path, FrameFormat(32)).note
    assert note.startswith("by its header, the last ")


def test_many_headers_in_an_flv_file_take_no_time(tmp_path):
    data = recording(tmp_path / "a.flv", RED, 2)
    (tmp_path / "bomb.flv").write_bytes(data + data[:13] * 2_000_000)
    started = time.monotonic()
    assert len(video.read_frames(tmp_path / "bomb.flv", FrameFormat(32)).frames) == 2
    assert time.monotonic() - started < 5


def test_repeated_frames_of_an_avi_file_are_not_missing(tmp_path):
    times = [*at_rate(25, 25), *(6 + time for time in at_rate(25, 25))]
    path = write(tmp_path / "a.avi", times, codec="mpeg4", time_base=Fraction(1, 25))
    reader = video.VideoReader(path)
    assert len(list(reader)) == 7
    assert reader.note is None


def test_still_of_a_stream_without_container(tmp_path):
    path = write(tmp_path / "a.h264", at_rate(25, 50), time_base=Fraction(1, 25))
    path = path.rename(tmp_path / "a.mp4")
    assert round((np.asarray(still(path, 1)).mean() - 20) / 4) == 25


def write_tracks(path, tracks):
    """Writes grey tracks to a Matroska file: lists of times, the first of which is the default."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in tracks]
        for stream in streams:
            stream.width = stream.height = 64
            stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 1000)
        for stream, (level, times) in zip(streams, tracks, strict=True):
            for time in times:
                frame = av.VideoFrame.from_ndarray(filled([level] * 3), format="rgb24")
                frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def test_track_of_one_picture_is_not_the_film(tmp_path):
    path = write_tracks(tmp_path / "a.mkv", [(200, [0]), (60, at_rate(10, 40))])
    frames = video.read_frames(path, FrameFormat(32))
    assert len(frames.frames) == 4
    assert all(abs(frame.mean() - 60) < 5 for frame in frames.frames)


def test_slides_are_the_film_if_they_come_first(tmp_path):
    path = write_tracks(tmp_path / "a.mkv", [(200, [0, 9]), (60, at_rate(10, 200))])
    assert [
        round(frame.mean(), -1) for frame in video.read_frames(path, FrameFormat(32)).frames
    ] == [200] * 10


def test_offset_is_from_the_start_of_the_sound_to_the_first_frame(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        picture = container.add_stream("libx264", rate=10)
        picture.width, picture.height, picture.pix_fmt = 96, 64, "yuv420p"
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8 * 8000), np.int16), layout="mono")
        samples.rate, samples.pts = 8000, 0
        container.mux(sound.encode(samples))
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(grey(number), format="rgb24")
            frame.pts, frame.time_base = 40 + number, TENTH
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
    reader = video.VideoReader(path)
    assert [time for time, _ in reader] == [0, 1, 2, 3]
    assert reader.offset == pytest.approx(4, abs=0.05)
    assert round((np.asarray(still(path, 1.05)).mean() - 20) / 4) == 10


def test_edit_list_is_not_reported_as_missing_frames(tmp_path):
    times = at_rate(Fraction(10), 40)
    path = write(tmp_path / "a.mp4", times, time_base=TENTH, g="10", bf="2", preset="medium")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        ticks = int(1 / container.streams.video[0].time_base)
    place = data.index(b"elst") + 12  # after version and count: duration, start
    start = struct.unpack(">i", data[place + 4 : place + 8])[0] + ticks * 3 // 2
    data[place : place + 8] = struct.pack(">ii", 1000, start)
    path.write_bytes(data)
    frames = video.read_frames(path, FrameFormat(32))
    assert frames.note is None
    assert numbers(frames)[0] == 15


# 10 and 14: BT.2020 with constant luminance and ICtCp, which swscale does not convert.
@pytest.mark.parametrize("matrix", [9, 10, 14])
@pytest.mark.parametrize(("transfer", "white"), [(16, 0.58), (18, 0.75)])
def test_diffuse_white_of_hdr_is_white(tmp_path, transfer, white, matrix):
    def setup(stream):
        stream.pix_fmt = "yuv420p10le"
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, 1
        context.color_trc, context.color_primaries = transfer, 9

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width = stream.height = 64
        setup(stream)
        for code in (white, white / 2):
            frame = av.VideoFrame(64, 64, "yuv420p10le")
            for plane, level in zip(frame.planes, (round(64 + 876 * code), 512, 512), strict=True):
                plane.update(np.full(plane.buffer_size // 2, level, np.uint16).tobytes())
            frame.pts, frame.time_base = round(10 * (white - code) / white) * 2, TENTH
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    bright, dark = (frame.mean() for frame in video.read_frames(path, FrameFormat(32)).frames)
    assert bright > 245
    assert 20 < dark < 150


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlist_named_as_a_video_opens_no_other_file(tmp_path, kind):
    write(tmp_path / "clip.mp4", at_rate(10, 20))
    reasons = []
    for name in ("clip.mp4", "missing.mp4"):
        path = tmp_path / "a.mp4"
        path.write_text(PLAYLISTS[kind].format(tmp_path / name))
        for read in (
            lambda path: video.read_frames(path, FrameFormat(32)),
            lambda path: still(path, 0),
        ):
            with pytest.raises(VideoError, match=r"^cannot be opened: ") as error:
                read(path)
            reasons.append(str(error.value))
    assert len(set(reasons)) == 1
