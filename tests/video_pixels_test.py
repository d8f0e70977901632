"""Tests of the pixels of videos: rotation, aspect, preprocessing, colours, JPEG."""

import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from video_files import at_rate, corners, grey, numbers, plain_preprocess, write

from xclip_jax.data import preprocess as preprocessing
from xclip_jax.data import video
from xclip_jax.data.preprocess import FrameFormat


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
    want = preprocessing.preprocess(
        np.ascontiguousarray(upright[:, ::-1] if mirrored else upright), FrameFormat(32)
    )
    (frame,) = video.read_frames(path, FrameFormat(32)).frames
    at = [(y, x) for y in (4, 28) for x in (4, 28)]
    assert [frame[p].tolist() for p in at] == [pytest.approx(want[p].tolist(), abs=6) for p in at]


def test_frame_is_freed_without_the_garbage_collector():
    frame = av.VideoFrame.from_ndarray(grey(0), format="rgb24")
    references = sys.getrefcount(frame)
    assert video.find_orientation(frame) == (False, 0)
    assert sys.getrefcount(frame) == references


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
    (frame,) = video.read_frames(path, FrameFormat(60)).frames
    rows, columns = (frame[..., 1].max(axis).astype(int) > 128 for axis in (1, 0))
    assert rows.sum() == pytest.approx(20, abs=1)
    assert columns.sum() == pytest.approx(20, abs=1)
    assert abs(int(np.flatnonzero(columns).mean() + 0.5) - 30) <= 1


def test_invalid_pixel_aspect_is_ignored():
    frame = av.VideoFrame.from_ndarray(grey(0), format="rgb24")
    assert video._to_picture(frame, Fraction(1, 65535)).pixel_aspect == 1
    assert video._to_picture(frame, None).pixel_aspect == 1
    assert video._to_picture(frame, Fraction(64, 51)).pixel_aspect == Fraction(64, 51)


@pytest.mark.parametrize("size", [224, 33])
@pytest.mark.parametrize(
    "shape",
    [(240, 320), (321, 243), (227, 225), (224, 224), (224, 399), (100, 333), (640, 360), (1, 1)],
)
def test_preprocess_equals_pillow(size, shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    want = plain_preprocess(image, size)
    np.testing.assert_array_equal(preprocessing.preprocess(image, FrameFormat(size)), want)
    np.testing.assert_array_equal(preprocessing.preprocess(noise, FrameFormat(size)), want)
    rgba = image.convert("RGBA")
    np.testing.assert_array_equal(preprocessing.preprocess(rgba, FrameFormat(size)), want)


def test_crop_interpolates_as_the_format_says():
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    resized = Image.fromarray(noise).resize((30, 20), Image.Resampling.BILINEAR)
    found = preprocessing.preprocess(noise, FrameFormat(20, interpolation="bilinear"))
    np.testing.assert_array_equal(found, np.asarray(resized)[:, 5:25])


def test_squash_takes_means_of_what_it_shrinks():
    """Shrinks three columns of two rows: a bilinear filter of Pillow is a triangle."""
    columns = np.array([[0, 60, 240], [0, 60, 240]], np.uint8)
    picture = np.repeat(columns[..., None], 3, axis=2)
    found = preprocessing.preprocess(picture, FrameFormat(1, "squash", "bilinear"))
    # Its half-width is 3 columns, the distances from its centre are 1, 0, 1: weights 2, 3, 2.
    assert found.tolist() == [[[round((2 * 0 + 3 * 60 + 2 * 240) / 7)] * 3]]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(240, 320), (33, 33), (7, 900), (900, 1)])
def test_squash_equals_pillow_whatever_the_shape(shape, interpolation):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image, filters = Image.fromarray(noise), Image.Resampling
    want = np.asarray(image.resize((33, 33), filters[interpolation.upper()]))
    format = FrameFormat(33, "squash", interpolation)
    for picture in (image, noise, image.convert("RGBA")):
        np.testing.assert_array_equal(preprocessing.preprocess(picture, format), want)
    wide = preprocessing.preprocess(image, format, Fraction(2))  # the shape of pixels is lost, too
    np.testing.assert_array_equal(wide, want)


def test_picture_caches_a_frame_of_each_format():
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    picture = video.Picture(Image.fromarray(noise), Fraction(1))
    formats = [FrameFormat(16), FrameFormat(16, "squash"), FrameFormat(8)]
    frames = [picture.to_square(format) for format in formats]
    assert [frame.shape[0] for frame in frames] == [16, 16, 8]
    assert not np.array_equal(*frames[:2])
    assert all(picture.to_square(f) is frame for f, frame in zip(formats, frames, strict=True))


def test_format_is_readable():
    assert str(FrameFormat()) == "224 px, crop, bicubic"
    assert str(FrameFormat(256, "squash", "bilinear")) == "256 px, squash, bilinear"
    spread = FrameFormat(288, "squash", "lanczos", 16)
    assert str(spread) == "288 px, squash, lanczos, 16 spread over the whole video"


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
        got = video._to_picture(frame, None).to_square(FrameFormat(32))[16, 16]
        assert got.tolist() == pytest.approx(rgb.tolist(), abs=1 if scale == 4 else 3)


def test_ten_bit_video_is_read(tmp_path):
    def setup(stream):
        stream.pix_fmt = "yuv420p10le"

    path = write(tmp_path / "a.mkv", at_rate(Fraction(10), 21), setup=setup)
    assert numbers(video.read_frames(path, FrameFormat(32))) == [0, 10, 20]


@pytest.mark.parametrize("pixel_format", ["gray", "yuva420p", "bgra", "rgb565le", "rgb24", "gbrp"])
def test_any_pixel_format_becomes_rgb(pixel_format):
    frame = av.VideoFrame.from_ndarray(grey(20), format="rgb24").reformat(format=pixel_format)
    array = video._to_picture(frame, None).to_square(FrameFormat(32))
    assert array.shape == (32, 32, 3)
    assert abs(array.mean() - 100) < 3


def test_jpeg_round_trip():
    picture = np.asarray(Image.fromarray(corners()).resize((64, 64), Image.BICUBIC))
    data = preprocessing.encode_jpeg(picture)
    assert data[:2] == b"\xff\xd8"
    back = preprocessing.decode_jpeg(data)
    assert back.shape == (64, 64, 3)
    assert back.dtype == np.uint8
    # With colour at half resolution: 4.4 on this picture of saturated edges.
    assert np.abs(back.astype(int) - picture).mean() < 2
    with pytest.raises(ValueError, match=r"."):
        preprocessing.decode_jpeg(b"not a picture")
    np.testing.assert_array_equal(
        preprocessing.decode_jpeg(preprocessing.encode_jpeg(np.asfortranarray(picture))), back
    )
