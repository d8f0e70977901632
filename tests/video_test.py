"""Tests of reading videos: the chosen frames, their pixels, and corrupted files.

The videos made here are grey, and the brightness of frame n is 20 + 4 n.
"""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import av
import numpy as np
import pytest
from av.container import InputContainer
from av.stream import Disposition
from PIL import Image

from xclip_jax.data import video

SHARED = Path(__file__).resolve().parents[2] / "shared"
MS = Fraction(1, 1000)


def grey(number):
    """Returns the picture of frame `number` < 50, with 4 levels per frame."""
    return np.full((64, 96, 3), 20 + 4 * number, np.uint8)


def corners(height=96, width=160):
    """Returns a picture: red top left, green top right, blue bottom left, white bottom right."""
    picture = np.zeros((height, width, 3), np.uint8)
    top, left = slice(0, height // 2), slice(0, width // 2)
    picture[top, left, 0] = picture[top, width // 2 :, 1] = picture[height // 2 :, left, 2] = 255
    picture[height // 2 :, width // 2 :] = 255
    return picture


def write(path, times, pictures=None, codec="libx264", time_base=MS, setup=None, **options):
    """Writes a video with one picture (numbered grey by default) at each of `times` in seconds."""
    pictures = pictures or [grey(number) for number in range(len(times))]
    options = {"crf": "4", "preset": "ultrafast"} | options if codec == "libx264" else options
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", time_base
        if setup:
            setup(stream)
        for time, picture in zip(times, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames):
    """Returns the numbers of grey frames."""
    return [round((float(frame.mean()) - 20) / 4) for frame in frames.frames]


def at_rate(rate, count):
    return [Fraction(number) / rate for number in range(count)]


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
    frames = video.read_frames(write(tmp_path / "a.mp4", at_rate(rate, 41), time_base=tick), 32)
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
    assert numbers(video.read_frames(path, 32)) == [0, 10, 20, 30, 40]


def test_avi_keeps_gaps_although_its_presentation_times_jump(tmp_path):
    times = [Fraction(n, 10) for n in range(60) if n < 15 or n >= 38]  # 37 frames
    path = write(tmp_path / "a.avi", times, None, time_base=Fraction(1, 10), preset="medium")
    with av.open(str(path)) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert stamps != sorted(stamps)
    assert numbers(video.read_frames(path, 32)) == [0, 10, 14, 14, 17, 27]


def test_frames_are_repeated_in_long_gaps(tmp_path):
    times = [Fraction(t) for t in ("0", "0.4", "1.1", "3.5", "3.6", "6")]
    frames = video.read_frames(write(tmp_path / "a.mkv", times), 32)
    assert numbers(frames) == [0, 1, 2, 2, 4, 4, 5]
    assert frames.times == pytest.approx([0, 0.4, 1.1, 1.1, 3.6, 3.6, 6])


@pytest.mark.parametrize("suffix", [".ts", ".mkv"])
def test_times_count_from_the_first_frame(tmp_path, suffix):
    times = [Fraction("16.8") + t for t in at_rate(Fraction(10), 25)]
    frames = video.read_frames(write(tmp_path / f"a{suffix}", times), 32)
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
    frames = video.read_frames(path, 32, start=start, end=end)
    assert numbers(frames) == chosen
    assert frames.note is None


def test_no_frame_between_start_and_end_is_an_error(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(Fraction(10), 20))
    with pytest.raises(video.VideoError, match=r"^no frame between 3\.0 s and 5\.0 s$"):
        video.read_frames(path, 32, start=3.0, end=5.0)
    with pytest.raises(video.VideoError, match=r"^no frame between 3\.0 s and its end$"):
        video.read_frames(path, 32, start=3.0)
    with pytest.raises(video.VideoError, match="no frame between"):
        video.read_frames(path, 32, start=1.0, end=0.5)


def test_decoding_stops_after_the_end(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(Fraction(10), 50))
    reader = video.VideoReader(path, start=0.0, end=1.0)
    assert len(list(reader)) == 2
    assert reader.count == 12  # that of 1.1 s is the first past the end


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
    clock = video._Clock(second=Fraction(100), rate=Fraction(25))
    assert [clock(stamp) for stamp in stamps] == ticks


@pytest.mark.parametrize("turn", range(8))
def test_rotated_and_mirrored_frames_are_upright(tmp_path, turn):
    degrees, mirrored = 90 * (turn % 4), turn >= 4
    path = write(
        tmp_path / "a.mp4",
        [Fraction(0)],
        [corners()],
        setup=lambda stream: stream.set_display_rotation(degrees, hflip=mirrored),
    )
    upright = np.rot90(corners(), turn % 4)  # both counterclockwise
    want = video.preprocess(np.ascontiguousarray(upright[:, ::-1] if mirrored else upright), 32)
    (frame,) = video.read_frames(path, 32).frames
    at = [(y, x) for y in (4, 28) for x in (4, 28)]
    assert [frame[p].tolist() for p in at] == [pytest.approx(want[p].tolist(), abs=6) for p in at]


@pytest.mark.parametrize("degrees", [0, 90])
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(64, 51)])
def test_pixels_are_made_square(tmp_path, degrees, aspect):
    # A white square of display pixels in the middle, whatever the shape of the stored ones.
    stored = np.zeros((240, round(320 / aspect) // 2 * 2, 3), np.uint8)
    half = round(40 / aspect)
    middle = stored.shape[1] // 2
    stored[80:160, middle - half : middle + half] = 255

    def setup(stream):
        stream.codec_context.sample_aspect_ratio = aspect
        stream.set_display_rotation(degrees)

    path = write(tmp_path / "a.mp4", [Fraction(0)], [stored], setup=setup)
    (frame,) = video.read_frames(path, 60).frames
    rows, columns = (frame[..., 1].max(axis).astype(int) > 128 for axis in (1, 0))
    assert rows.sum() == pytest.approx(20, abs=1)
    assert columns.sum() == pytest.approx(20, abs=1)
    assert abs(int(np.flatnonzero(columns).mean() + 0.5) - 30) <= 1


def test_invalid_pixel_aspect_is_ignored():
    frame = av.VideoFrame.from_ndarray(grey(0), format="rgb24")
    assert video._to_picture(frame, Fraction(1, 65535)).pixel_aspect == 1
    assert video._to_picture(frame, None).pixel_aspect == 1
    assert video._to_picture(frame, Fraction(64, 51)).pixel_aspect == Fraction(64, 51)


def plain_preprocess(image, size):
    """Returns the result of CLIP's transform: Resize(size, BICUBIC), CenterCrop(size)."""
    width, height = image.size
    if width <= height:
        image = image.resize((size, int(size * height / width)), Image.BICUBIC)
    else:
        image = image.resize((int(size * width / height), size), Image.BICUBIC)
    top = int(round((image.height - size) / 2.0))  # noqa: RUF046, as torchvision writes it
    left = int(round((image.width - size) / 2.0))  # noqa: RUF046
    return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [224, 33])
@pytest.mark.parametrize(
    "shape",
    [(240, 320), (321, 243), (227, 225), (224, 224), (224, 399), (100, 333), (640, 360), (1, 1)],
)
def test_preprocess_equals_pillow(size, shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    want = plain_preprocess(image, size)
    np.testing.assert_array_equal(video.preprocess(image, size), want)
    np.testing.assert_array_equal(video.preprocess(noise, size), want)
    rgba = image.convert("RGBA")
    np.testing.assert_array_equal(video.preprocess(rgba, size), want)


COEFFICIENTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 2: (0.299, 0.114), 9: (0.2627, 0.0593)}


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p", "yuv420p10le", "yuv444p"])
@pytest.mark.parametrize("matrix", [*COEFFICIENTS, 8])
@pytest.mark.parametrize("full_range", [False, True])
def test_colour_matrix_and_range_are_applied(pixel_format, matrix, full_range):
    red, blue = COEFFICIENTS.get(matrix, COEFFICIENTS[2])  # YCgCo is beyond swscale: as if untagged
    full_range |= pixel_format.startswith("yuvj")
    scale = 4 if "10" in pixel_format else 1
    for rgb in np.array([[200, 40, 60], [30, 180, 90], [40, 50, 220], [128, 128, 128]]):
        y = rgb @ [red, 1 - red - blue, blue]
        cb, cr = (rgb[2] - y) / (2 - 2 * blue), (rgb[0] - y) / (2 - 2 * red)
        if full_range:
            planes = y, cb + 128, cr + 128
        else:
            planes = 16 + y * 219 / 255, 128 + cb * 224 / 255, 128 + cr * 224 / 255
        frame = av.VideoFrame(64, 48, pixel_format)
        for plane, level in zip(frame.planes, planes, strict=True):
            dtype = np.uint16 if scale == 4 else np.uint8
            plane.update(np.full(plane.buffer_size // dtype().nbytes, level * scale + 0.5, dtype))
        frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
        got = video._to_picture(frame, None).to_square(32)[16, 16]
        assert got.tolist() == pytest.approx(rgb.tolist(), abs=1 if scale == 4 else 3)


def test_ten_bit_video_is_read(tmp_path):
    def setup(stream):
        stream.pix_fmt = "yuv420p10le"

    path = write(tmp_path / "a.mkv", at_rate(Fraction(10), 21), setup=setup)
    assert numbers(video.read_frames(path, 32)) == [0, 10, 20]


@pytest.mark.parametrize("pixel_format", ["gray", "yuva420p", "bgra", "rgb565le", "rgb24", "gbrp"])
def test_any_pixel_format_becomes_rgb(pixel_format):
    frame = av.VideoFrame.from_ndarray(grey(20), format="rgb24").reformat(format=pixel_format)
    array = video._to_picture(frame, None).to_square(32)
    assert array.shape == (32, 32, 3)
    assert abs(array.mean() - 100) < 3


def test_truncated_file_gives_its_first_frames(tmp_path):
    path = write(tmp_path / "a.mkv", at_rate(Fraction(10), 50), g="10")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    frames = video.read_frames(path, 32)
    assert numbers(frames) == [0, 10, 20, 30][: len(frames.frames)]
    assert 2 <= len(frames.frames) <= 4
    path.write_bytes(data[:300])
    with pytest.raises(video.VideoError, match=r"^(no|cannot)"):
        video.read_frames(path, 32)


def test_missing_frames_are_noted(tmp_path):
    path = write(tmp_path / "a.avi", at_rate(Fraction(10), 50), time_base=Fraction(1, 10), g="10")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    frames = video.read_frames(path, 32)
    assert frames.note.startswith("far fewer frames than the header states (")
    assert frames.note.endswith(" of 50)")
    assert video.read_frames(path, 32, end=1.0).note is None


def test_decoding_error_keeps_earlier_frames(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(Fraction(10), 50), g="10", tune="zerolatency")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][30]
    data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    frames = video.read_frames(path, 32)
    assert numbers(frames) == [0, 10, 20]
    assert frames.note.startswith("decoder stopped at frame 30: Invalid data")
    assert video.read_frames(path, 32, end=2.0).note is None


def test_corrupted_packets_before_the_first_frame_are_skipped(tmp_path):
    path = write(tmp_path / "a.mp4", at_rate(Fraction(10), 50), g="10", tune="zerolatency")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in [packet for packet in container.demux(video=0) if packet.size][:10]:
            data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    frames = video.read_frames(path, 32)
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
        video.read_frames(path, 32)


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
        ".": "^cannot be opened: Is a directory$",
    }
    for name, reason in reasons.items():
        with pytest.raises(video.VideoError, match=reason):
            video.read_frames(tmp_path / name, 32)
    assert capfd.readouterr().err == ""


def test_names_like_protocols_or_options_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.mp4", at_rate(Fraction(10), 11))
    for name in ("-v.mp4", "concat:b.mp4", "100%d.mp4", "x.mp4.", "\u00e9 @.mov"):
        Path(name).write_bytes(Path("a.mp4").read_bytes())
        assert numbers(video.read_frames(name, 32)) == [0, 10]


def test_cover_art_is_not_a_video_stream():
    cover = SimpleNamespace(disposition=Disposition.attached_pic | Disposition.default)
    container = Mock(spec=InputContainer, streams=SimpleNamespace(video=[cover]))
    with pytest.raises(video.VideoError, match=r"^no video stream$"):
        video._video_stream(container)
    unknown = SimpleNamespace(disposition=Disposition.default, codec_context=None)
    container.streams.video.append(unknown)
    with pytest.raises(video.VideoError, match=r"^no decoder for the video stream$"):
        video._video_stream(container)


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
        assert numbers(video.read_frames(path, 32)) == [chosen]


def test_jpeg_round_trip():
    picture = np.asarray(Image.fromarray(corners()).resize((64, 64), Image.BICUBIC))
    data = video.encode_jpeg(picture)
    assert data[:2] == b"\xff\xd8"
    back = video.decode_jpeg(data)
    assert back.shape == (64, 64, 3)
    assert back.dtype == np.uint8
    # With colour at half resolution: 4.4 on this picture of saturated edges.
    assert np.abs(back.astype(int) - picture).mean() < 2
    with pytest.raises(ValueError, match=r"."):
        video.decode_jpeg(b"not a picture")
    np.testing.assert_array_equal(
        video.decode_jpeg(video.encode_jpeg(np.asfortranarray(picture))), back
    )


# For the files of shared/: the number of frames, or the reason why there is none.
SHARED_FRAMES = {
    "decord_pancake.mkv": 11,
    "iio_cockatoo.mp4": 14,
    "iv_example1.mp4": 8,
    "lb_0.mp4": 9,
    "mma_demo.mp4": 10,
    "mma_test_video_structuralize.mp4": 10,
    "mp_bbb_432_433.webm": 1,
    "mp_chaplin.mp4": 10,
    "mp_fire2.mp4": 3,
    "skv_bigbuckbunny.mp4": 6,
    "skv_bikes.mp4": 10,
    "tc_nasa_13013.mp4": 13,
    "vl_sample_demo_3.mp4": 7,
    "vp_water_bottle_drumming.mp4": 9,
    "decord_corrupted.mp4": 3,
    "decord_video_0.mov": 1,
    "decord_video_90.mov": 1,
    "decord_video_270.mov": 1,
    "mb_annex-b-avc.mkv": 36,
    "mb_edts.mp4": 9,
    "mb_rotate-buck-bunny.mp4": 2,
    "mb_sar_2x1.mp4": 5,
    "mb_toothsome-dts.mp4": "no video stream",
    "mma_part_0.mp4": 2,
    "mp_-video-with-dash-.mp4": 5,
    "mp_doc_example_mask.mp4": 10,
    "mp_doc_result_empty.webm": "empty file (0 bytes)",
    "mp_smpte-2997.mp4": 11,
    "mp_transparent.webm": 5,
    "skv_carphone_distorted.mp4": 4,
    "tc_av1.mkv": 5,
    "tc_bt709_full_range.mp4": 1,
    "tc_h265.mp4": 1,
    "tc_h265_10bits.mp4": 1,
}


def shared(name):
    path = next((p for p in SHARED.glob("clips*/*") if p.name == name), None)
    if path is None:
        pytest.skip(f"needs {name} of the clips in {SHARED}")
    return path


def test_every_shared_clip_is_expected():
    if not SHARED.is_dir():
        pytest.skip(f"needs the clips in {SHARED}")
    names = {p.name for p in SHARED.glob("clips*/*")} - {"captions.json"}
    assert names <= set(SHARED_FRAMES)


@pytest.mark.parametrize("name", SHARED_FRAMES)
def test_shared_clips_are_read_or_listed(name, capfd):
    path, expected = shared(name), SHARED_FRAMES[name]
    if isinstance(expected, str):
        with pytest.raises(video.VideoError) as error:
            video.read_frames(path, 64)
        assert str(error.value) == expected
        return
    frames = video.read_frames(path, 64)
    assert len(frames.frames) == len(frames.times) == expected
    assert all(k - 1.1 < time <= k for k, time in enumerate(frames.times))
    stopped = "decoder stopped at frame 28: Invalid data found when processing input"
    assert frames.note == (stopped if name == "decord_corrupted.mp4" else None)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "turn"),
    [
        ("decord_video_0.mov", None),
        ("decord_video_90.mov", Image.Transpose.ROTATE_270),
        ("decord_video_270.mov", Image.Transpose.ROTATE_90),
        ("mb_rotate-buck-bunny.mp4", Image.Transpose.ROTATE_270),
        ("mp_fire2.mp4", Image.Transpose.ROTATE_180),
    ],
)
def test_shared_rotated_clips_are_upright(name, turn):
    # The turns were found by looking at the pictures and at the captions that come with them.
    frames = video.read_frames(shared(name), 64)
    with av.open(str(shared(name))) as container:
        stored = list(container.decode(video=0))
    (last,) = (f for f in stored if f.time - stored[0].time == pytest.approx(frames.times[-1]))
    image = last.to_image() if turn is None else last.to_image().transpose(turn)
    np.testing.assert_allclose(frames.frames[-1], plain_preprocess(image, 64), atol=3)


def test_shared_clip_with_wide_pixels_is_stretched():
    # 640 x 360 stored, 1280 x 360 shown: the bars in the middle half of the width remain.
    with av.open(str(shared("mb_sar_2x1.mp4"))) as container:
        image = next(container.decode(video=0)).to_image()
    assert video.read_frames(shared("mb_sar_2x1.mp4"), 64, end=0.0).frames[0] == pytest.approx(
        plain_preprocess(image.resize((1280, 360), Image.BICUBIC), 64).astype(int), abs=24
    )
