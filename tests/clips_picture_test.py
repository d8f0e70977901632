"""Tests of the pictures of clips, of previews, and of clips that cannot be written."""

import gc
import itertools
import os
import resource
import tracemalloc
from pathlib import Path

import av
import clip_files
import numpy as np
import pytest
import video_files
from clip_files import numbered, read_numbers

from xclip_jax.cli import InputError
from xclip_jax.data.container import VideoError
from xclip_jax.data.video import VideoReader
from xclip_jax.search import transcode
from xclip_jax.search.clips import ClipCancelled, export_clip, make_preview

SUFFIXES = (".mp4", ".mkv", ".mov", ".webm")


def encode(path, start, end, output):
    return export_clip(path, start, end, output, reencode=True)


def first_picture(path):
    _, picture = next(iter(VideoReader(path)))
    return picture


def write_corners(path, degrees=0, mirrored=False, aspect=None, size=(96, 160), codec="libx264"):
    def setup(stream):
        if degrees or mirrored:
            stream.set_display_rotation(degrees, hflip=mirrored)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect

    times, pictures = video_files.at_rate(25, 6), [video_files.corners(*size)] * 6
    return video_files.write(path, times, pictures, codec=codec, setup=setup)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Makes a film of 2 s with 50 numbered frames and sound."""
    return clip_files.write(tmp_path_factory.mktemp("clips") / "film.mp4", numbered(50))


# Rotation, shape, colours


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("degrees", "mirrored"), itertools.product((0, 90, 180, 270), (0, 1)))
def test_rotation_is_kept_by_a_copy_and_applied_by_encoding(tmp_path, degrees, mirrored, suffix):
    path, output = write_corners(tmp_path / "film.mp4", degrees, mirrored), tmp_path / f"a{suffix}"
    expected = np.asarray(first_picture(path).image, int)
    for how in (export_clip, encode):
        clip = how(path, 0, 0.2, output)
        assert (clip.encoded is None) == (how is export_clip and suffix != ".webm")
        picture = np.asarray(first_picture(output).image, int)
        assert picture.shape == expected.shape
        assert np.abs(picture - expected).mean() < 4
        with av.open(str(output)) as container:
            frame = next(container.decode(video=0))
        if clip.encoded:
            assert "DISPLAYMATRIX" not in frame.side_data


@pytest.mark.parametrize("degrees", [0, 90])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pixel_aspect_is_kept_by_a_copy_and_applied_by_encoding(tmp_path, degrees, suffix):
    path, output = write_corners(tmp_path / "film.mp4", degrees, aspect=2), tmp_path / f"a{suffix}"
    export_clip(path, 0, 0.2, output)
    if suffix != ".webm":
        assert first_picture(output).pixel_aspect == (2 if degrees == 0 else 0.5)
    encode(path, 0, 0.2, output)
    picture = first_picture(output)
    assert picture.image.size == ((320, 96) if degrees == 0 else (96, 320))
    assert picture.pixel_aspect == 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [((75, 101), (100, 74)), ((3, 2001), (2000, 2)), ((97, 161), (160, 96)), ((1, 1), (2, 2))],
)
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sizes_become_even(tmp_path, size, expected, suffix):
    path = write_corners(tmp_path / "film.mkv", size=size, codec="rawvideo")
    encode(path, 0, 0.2, tmp_path / f"a{suffix}")
    assert first_picture(tmp_path / f"a{suffix}").image.size == expected


def test_large_pictures_are_scaled_down(tmp_path):
    path = write_corners(tmp_path / "film.mkv", size=(64, 8000))
    encode(path, 0, 0.2, tmp_path / "a.mp4")
    assert first_picture(tmp_path / "a.mp4").image.size == (3840, 30)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("form", ["yuv420p", "yuvj420p", "yuv444p", "bgr0", "yuv420p10le"])
def test_colours_are_those_that_the_model_sees(tmp_path, form, suffix):
    codec = "mjpeg" if form == "yuvj420p" else "ffv1"
    with av.open(str(tmp_path / "film.mkv"), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 96, form
        for _ in range(6):
            frame = av.VideoFrame.from_ndarray(video_files.corners(), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=form)))
        container.mux(stream.encode(None))
    encode(tmp_path / "film.mkv", 0, 0.2, tmp_path / f"a{suffix}")
    expected = np.asarray(first_picture(tmp_path / "film.mkv").image, int)
    picture = np.asarray(first_picture(tmp_path / f"a{suffix}").image, int)
    assert np.abs(picture - expected)[8:-8:16, 8:-8:16].max() < 12  # away from edges


def test_pictures_of_another_size_get_a_border(tmp_path):
    times = video_files.at_rate(25, 6)
    for name, size in (("a.ts", (96, 160)), ("b.ts", (160, 96))):
        video_files.write(tmp_path / name, times, [np.full((*size, 3), 200, np.uint8)] * 6)
    (tmp_path / "film.ts").write_bytes(
        (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes()
    )
    encode(tmp_path / "film.ts", 0, 0.5, tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        *_, last = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
    assert last.shape == (96, 160, 3)
    assert last[48, 80].min() > 180
    assert last[48, [20, 140]].max() < 30


# Previews


def test_a_preview_is_small_and_of_the_baseline_profile(tmp_path):
    film = clip_files.write(tmp_path / "film.mkv", numbered(50, 640), rate=50)
    make_preview(film, 0, 0.5, tmp_path / "a.mp4", height=180)
    with av.open(str(tmp_path / "a.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.codec_context.profile in ("Baseline", "Constrained Baseline")
        assert (video.width, video.height, video.format.name) == (26, 180, "yuv420p")
        assert audio.codec_context.name == "aac"
        packets = [(packet.pts, packet.dts) for packet in container.demux(video) if packet.size]
    assert all(pts == dts for pts, dts in packets)
    assert read_numbers(tmp_path / "a.mp4")[0] == list(range(0, 25, 2))  # 25 of 50 a second
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is complete


def test_a_preview_has_at_most_a_minute(tmp_path):
    path = video_files.write(tmp_path / "film.mkv", range(0, 200, 10), g="1")
    clip = make_preview(path, 20, 190, tmp_path / "a.mp4")
    assert (clip.start, clip.end) == (20, 80)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(60, abs=0.1)


def test_without_an_encoder_of_h264_it_is_vp9(film, tmp_path, monkeypatch):
    monkeypatch.setattr(transcode, "has_encoder", lambda name: name not in ("libx264",))
    make_preview(film, 0, 1, tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "vp9"
    assert read_numbers(tmp_path / "a.mp4")[0] == list(range(25))
    with pytest.raises(InputError, match=r"\.mov: PyAV was built without the encoder libx264"):
        encode(film, 0, 1, tmp_path / "a.mov")
    assert os.listdir(tmp_path) == ["a.mp4"]


# Safety


@pytest.mark.parametrize(
    "name", ["-a.mp4", "a:b.mp4", "file:c.mp4", "%d.mp4", "a\n'b\".mp4", "é .mp4"]
)
def test_hostile_names_are_only_names(film, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / name
    source.write_bytes(film.read_bytes())
    for how in (export_clip, encode, make_preview):
        how(os.path.relpath(source), 0.4, 1, name)
        assert len(read_numbers(os.path.abspath(name))[0]) >= 15
    assert sorted(os.listdir(tmp_path)) == sorted(["in", name])


def test_a_name_that_is_not_utf_8_can_be_read(film, tmp_path):
    source = os.fsencode(tmp_path) + b"/\xff.mp4"
    with open(source, "wb") as file:
        file.write(film.read_bytes())
    export_clip(os.fsdecode(source), 0, 1, tmp_path / "a.mp4")
    with pytest.raises(InputError, match="must be a name in UTF-8"):
        export_clip(film, 0, 1, os.fsdecode(source))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", [export_clip, encode])
def test_a_full_disk_is_an_error_and_leaves_nothing(film, tmp_path, suffix, how):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / f"a{suffix}").write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match="cannot be written: File too large"):
            how(film, 0, 1, tmp_path / f"a{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_an_output_that_cannot_be_written_is_an_error(film, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "a.mp4", tmp_path / ("a" * 300 + ".mp4")):
        for how in (export_clip, encode, make_preview):
            with pytest.raises(InputError, match="cannot be written: "):
                how(film, 0, 1, output)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("how", [export_clip, make_preview])
@pytest.mark.parametrize("calls", [0, 1, 30])
def test_stop_cancels_and_leaves_nothing(film, tmp_path, how, calls):
    remaining = iter([False] * calls)
    with pytest.raises(ClipCancelled):
        how(film, 0.4, 2, tmp_path / "a.mp4", stop=lambda: next(remaining, True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("start", "end", "output", "message"),
    [
        (1, 1, "a.mp4", "start 1 s, end 1 s: end must be after start, and both at least 0"),
        (-1, 1, "a.mp4", "both at least 0"),
        (0, float("nan"), "a.mp4", "both at least 0"),
        (0, float("inf"), "a.mp4", "both at least 0"),
        (5, 6, "a.mp4", "start 5 s: the film ends at 2 s"),
        (1e9, 2e9, "a.mp4", "the film ends at 2 s"),
        (0, 1, "a.avi", r"must end in \.mp4, \.mkv, \.webm, \.mov"),
        (0, 1, "a", "must end in"),
        (0, 1, "s3://bucket/a.mp4", "must be a path of this machine"),
    ],
)
def test_invalid_input_is_an_error(film, tmp_path, monkeypatch, start, end, output, message):
    monkeypatch.chdir(tmp_path)
    for how in (export_clip, encode):
        with pytest.raises(InputError, match=message):
            how(film, start, end, output)
    assert not list(tmp_path.iterdir())


def test_the_film_is_not_replaced_by_its_clip(film, tmp_path):
    (tmp_path / "link.mp4").symlink_to(film)
    content = film.read_bytes()
    with pytest.raises(InputError, match="is the film itself"):
        export_clip(film, 0, 1, tmp_path / "link.mp4")
    assert film.read_bytes() == content


def test_unreadable_films_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"gone\.mp4: no such file"):
        export_clip(tmp_path / "gone.mp4", 0, 1, tmp_path / "a.mp4")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    for name in ("list.mp4", "empty.mp4", "noise.mp4"):
        for how in (export_clip, make_preview):
            with pytest.raises(VideoError):
                how(tmp_path / name, 0, 1, tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()


def test_damaged_packets_are_left_out(film, tmp_path):
    content = bytearray(film.read_bytes())
    random = np.random.default_rng(0)
    for place in random.integers(len(content) // 4, len(content) // 2, 40):
        content[place] ^= 255
    (tmp_path / "film.mp4").write_bytes(content)
    for how in (export_clip, encode, make_preview):
        try:
            how(tmp_path / "film.mp4", 0, 2, tmp_path / "a.mp4")
        except VideoError:
            assert not (tmp_path / "a.mp4").exists()


def test_memory_does_not_grow_with_the_length(tmp_path):
    pictures = [np.full((720, 1280, 3), 100, np.uint8)] * 100
    path = video_files.write(tmp_path / "film.mp4", video_files.at_rate(25, 100), pictures)
    make_preview(path, 0, 0.2, tmp_path / "a.mp4")
    gc.disable()
    try:
        before = read_memory()
        make_preview(path, 0, 4, tmp_path / "a.mp4")
        assert read_memory() - before < 50e6  # 100 frames have 138 MB
    finally:
        gc.enable()


def read_memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_late_sound_needs_no_memory_for_the_silence(tmp_path):
    times = [0, 1, 240]
    path = clip_files.write_at(tmp_path / "film.mkv", times, numbered(3), [(0, 1)], length=1)
    tracemalloc.start()
    encode(path, 0, 240, tmp_path / "a.mp4")
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
