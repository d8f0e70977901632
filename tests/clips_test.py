"""Tests of clips: exact bounds, copied packets, sound in time with the picture, safety."""

from fractions import Fraction

import av
import clip_files
import numpy as np
import pytest
import video_files
from clip_files import flashing, numbered, read_numbers, read_onsets, read_packets

from xclip_jax.cli import InputError
from xclip_jax.data.video import VideoReader
from xclip_jax.search.clips import export_clip, make_preview

SUFFIXES = (".mp4", ".mkv", ".mov", ".webm")


def encode(path, start, end, output):
    return export_clip(path, start, end, output, reencode=True)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Makes a film of 2 s with 50 numbered frames, a key frame every 0.4 s, and sound."""
    return clip_files.write(tmp_path_factory.mktemp("clips") / "film.mp4", numbered(50))


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    """Makes a film of 3 s with a flash and a beep after 2 s."""
    path = tmp_path_factory.mktemp("clips") / "flash.mp4"
    return clip_files.write(path, flashing(3, [(2, 2.2)]), [(2, 2.2)])


# Exact bounds


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [(0, 0.4, 0, 9), (0.52, 1.2, 13, 29), (1.0, 5.0, 25, 49), (1.96, 2.0, 49, 49)],
)
def test_encoding_has_exactly_the_frames_of_the_moment(
    film, tmp_path, suffix, start, end, first, last
):
    clip = encode(film, start, end, tmp_path / f"clip{suffix}")
    numbers, times = read_numbers(tmp_path / f"clip{suffix}")
    assert numbers == list(range(first, last + 1))
    np.testing.assert_allclose(times, (np.array(numbers) - first) / 25, atol=0.001)
    assert clip.start == start
    assert clip.end == pytest.approx(min(end, 2.0))


def test_a_start_between_two_frames_shows_the_frame_of_that_time(film, tmp_path):
    encode(film, 1.01, 1.21, tmp_path / "clip.mp4")
    numbers, times = read_numbers(tmp_path / "clip.mp4")
    assert numbers == [25, 26, 27, 28, 29, 30]
    np.testing.assert_allclose(times, [0, 0.03, 0.07, 0.11, 0.15, 0.19], atol=0.001)


def test_pictures_keep_their_times_and_a_held_one_its_length(tmp_path):
    times = [Fraction(n, 10) for n in (0, 1, 5, 6, 7, 30)]
    video_files.write(tmp_path / "film.mkv", times, numbered(6), g="1")
    encode(tmp_path / "film.mkv", 0.2, 2.5, tmp_path / "clip.mp4")
    numbers, shown = read_numbers(tmp_path / "clip.mp4")
    assert numbers == [1, 2, 3, 4, 4]  # the last again near its end
    np.testing.assert_allclose(shown, [0, 0.3, 0.4, 0.5, 2.2], atol=0.002)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(2.3, abs=0.01)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_frames_of_avi_and_b_frames_are_exact(tmp_path, codec):
    path = tmp_path / "film.avi"
    options = {"bf": "2", "g": "12"} | ({"qscale": "2"} if codec == "mpeg4" else {"crf": "4"})
    times = video_files.at_rate(25, 50)
    video_files.write(path, times, numbered(50), codec=codec, time_base=Fraction(1, 25), **options)
    expected = [  # AVI's times of B-frames are those of the decoder's output
        clip_files.get_number(np.asarray(picture.image))
        for _, picture in VideoReader(path, times=times)
    ]
    encode(path, 1.0, 1.4, tmp_path / "clip.mp4")
    assert read_numbers(tmp_path / "clip.mp4")[0] == expected[25:35]


# Copies


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("bframes", [0, 2])
def test_a_copy_starts_at_a_key_frame_and_has_the_same_packets(tmp_path, suffix, bframes):
    path = clip_files.write(tmp_path / "film.mp4", numbered(50), bf=str(bframes))
    output = tmp_path / f"clip{suffix}"
    clip = export_clip(path, 0.5, 1.0, output)
    assert clip.encoded is None
    assert (clip.start, clip.end) == (0.4, 1.0)
    numbers, times = read_numbers(output)
    assert numbers[:15] == list(range(10, 25))
    assert len(numbers) <= 15 + bframes  # reference frames of the last ones
    assert times[0] <= 0.001
    np.testing.assert_allclose(np.diff(times[:15]), 0.04, atol=0.002)
    source, copied = read_packets(path), read_packets(output)
    place = [data for _, data in source].index(copied[0][1])
    assert [data for _, data in copied] == [data for _, data in source[place:][: len(copied)]]
    sound = [data for _, data in read_packets(path, "audio")]
    copied = [data for _, data in read_packets(output, "audio")]
    place = sound.index(copied[0])
    assert copied == sound[place : place + len(copied)]
    assert len(copied) * 1024 / clip_files.RATE == pytest.approx(0.6, abs=0.03)


def test_pictures_of_an_open_gop_that_need_an_earlier_one_are_left_out(tmp_path):
    options = {"x264-params": "open-gop=1:keyint=10:min-keyint=10:bframes=2:scenecut=0"}
    path = clip_files.write(tmp_path / "film.mp4", numbered(50), preset="veryfast", **options)
    clip = export_clip(path, 0.9, 1.4, tmp_path / "clip.mp4")
    assert clip.encoded is None
    numbers, times = read_numbers(tmp_path / "clip.mp4")
    first = round(clip.start * 25)
    assert numbers[: 35 - first] == list(range(first, 35))
    assert times[0] == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize(
    ("name", "codec", "output", "why"),
    [
        ("film.mp4", "libx264", "clip.webm", "a .webm file has no h264"),
        ("film.avi", "mpeg4", "clip.webm", "a .webm file has no mpeg4"),
        ("film.webm", "libvpx", "clip.mp4", "a .mp4 file has no vp8"),
    ],
)
def test_codecs_that_do_not_fit_the_container_are_encoded(tmp_path, name, codec, output, why):
    path = video_files.write(
        tmp_path / name, video_files.at_rate(25, 25), numbered(25), codec=codec
    )
    assert export_clip(path, 0, 0.4, tmp_path / output).encoded == why
    assert len(read_numbers(tmp_path / output)[0]) == 10


def test_a_distant_key_frame_is_encoded(tmp_path):
    path = video_files.write(
        tmp_path / "film.mp4", video_files.at_rate(25, 50), numbered(50), g="250"
    )
    clip = export_clip(path, 1.2, 1.6, tmp_path / "clip.mp4")
    assert clip.encoded == "the last key frame is 1.2 s before the start"
    assert read_numbers(tmp_path / "clip.mp4")[0] == list(range(30, 40))
    assert export_clip(path, 1.0, 1.6, tmp_path / "clip.mp4").encoded is None


def test_subtitles_and_second_tracks_are_dropped(tmp_path, film):
    with av.open(str(film)) as source, av.open(str(tmp_path / "two.mkv"), "w") as output:
        streams = [source.streams.video[0], source.streams.audio[0]]
        copies = [output.add_stream_from_template(stream) for stream in streams]
        again = output.add_stream_from_template(streams[1])
        for packet in source.demux(streams):
            if packet.size:
                data = bytes(packet), packet.pts, packet.dts, packet.time_base
                is_sound = packet.stream.type == "audio"
                packet.stream = copies[is_sound]
                output.mux(packet)
                if is_sound:
                    twin = av.Packet(data[0])
                    twin.pts, twin.dts, twin.time_base, twin.stream = *data[1:], again
                    output.mux(twin)
    export_clip(tmp_path / "two.mkv", 0, 1, tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]


# Sound


@pytest.mark.parametrize("how", ["copy", "encode", "preview"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sound_and_picture_are_in_time(flash, tmp_path, how, suffix):
    output = tmp_path / f"clip{suffix}"
    if how == "preview" and suffix not in (".mp4", ".webm"):
        pytest.skip("not a preview's format")
    if how == "copy" and suffix == ".webm":
        pytest.skip("not copied")
    make = {"copy": export_clip, "encode": encode, "preview": make_preview}[how]
    clip = make(flash, 1.3, 3, output)
    assert (clip.encoded is None) == (how == "copy")
    seen, heard = read_onsets(output)
    assert abs(seen - heard) < 0.015
    assert seen == pytest.approx(2 - clip.start, abs=0.01)


@pytest.mark.parametrize("how", [export_clip, encode])
@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.ts"])
def test_times_count_from_the_first_frame_if_the_picture_starts_late(tmp_path, name, how):
    path = clip_files.write(tmp_path / name, flashing(3, [(2, 2.2)]), [(3, 3.2)], late=1)
    clip = how(path, 1.6, 3, tmp_path / "clip.mp4")
    seen, heard = read_onsets(tmp_path / "clip.mp4")
    assert abs(seen - heard) < 0.025
    assert seen == pytest.approx(2 - clip.start, abs=0.01)


@pytest.mark.parametrize("how", [export_clip, encode])
def test_joined_recordings_are_one_film(tmp_path, how):
    parts = [
        clip_files.write_at(
            tmp_path / f"{number}.ts", [n / 25 for n in range(75)], flashing(3, spans), spans,
            origin=origin,
        )
        for number, (origin, spans) in enumerate([(0, []), (100, [(1, 1.2)]), (5, [(2, 2.2)])])
    ]  # fmt: skip
    (tmp_path / "film.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    times = [Fraction(number, 50) for number in range(450)]  # as an index counts them
    shown = VideoReader(tmp_path / "film.ts", times=times)
    white = [time for time, picture in shown if np.asarray(picture.image).mean() > 120]
    for start, end, expected in [(2.6, 5, 4.0), (6.4, 9, 8.0)]:
        expected = min(time for time in white if time > expected - 0.5)
        clip = how(tmp_path / "film.ts", start, end, tmp_path / "clip.mp4")
        seen, heard = read_onsets(tmp_path / "clip.mp4")
        assert abs(seen - heard) < 0.035
        assert seen == pytest.approx(expected - clip.start, abs=0.005)


def test_a_broadcast_cut_before_a_key_frame_is_in_time(tmp_path):
    path = clip_files.write(
        tmp_path / "whole.ts", flashing(3, [(2, 2.2)]), [(2, 2.2)], g="20", bf="2"
    )
    content = path.read_bytes()
    (tmp_path / "film.ts").write_bytes(content[188 * (len(content) // 188 // 8) :])
    for how in (export_clip, encode):
        clip = how(tmp_path / "film.ts", 0.6, 2.9, tmp_path / "clip.mp4")
        seen, heard = read_onsets(tmp_path / "clip.mp4")
        assert abs(seen - heard) < 0.035
    encode(tmp_path / "film.ts", 0, 2.9, tmp_path / "clip.mp4")
    assert clip.start == 0.6
    assert read_onsets(tmp_path / "clip.mp4")[0] == pytest.approx(seen + 0.6, abs=0.02)


@pytest.mark.parametrize("how", [export_clip, encode, make_preview])
def test_films_without_sound_or_with_longer_sound(tmp_path, how):
    silent = clip_files.write(tmp_path / "silent.mp4", numbered(25), None)
    how(silent, 0, 1, tmp_path / "clip.mp4")
    assert read_onsets(tmp_path / "clip.mp4")[1] is None
    longer = clip_files.write(tmp_path / "longer.mp4", numbered(25), [(1.5, 1.6)], length=4)
    how(longer, 0.4, 3, tmp_path / "clip.mp4")
    assert read_numbers(tmp_path / "clip.mp4")[0] == list(range(10, 25))
    assert read_onsets(tmp_path / "clip.mp4")[1] == pytest.approx(1.1, abs=0.03)
    with pytest.raises(InputError, match="start 2 s: the film ends at 1 s"):
        how(longer, 2, 3, tmp_path / "clip.mp4")


def test_missing_sound_is_silence(tmp_path):
    path = clip_files.write(tmp_path / "film.mp4", numbered(50), [(0, 0.4)], length=0.4)
    encode(path, 0.2, 1.2, tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.audio[0].duration * container.streams.audio[
            0
        ].time_base == pytest.approx(1, abs=0.03)
    assert read_onsets(tmp_path / "clip.mp4")[1] < 0.01
