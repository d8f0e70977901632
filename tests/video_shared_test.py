"""Tests of reading the downloaded clips in shared/, which are skipped without them."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from video_files import plain_preprocess

from xclip_jax.data import video
from xclip_jax.data.preprocess import FrameFormat

SHARED = Path(__file__).resolve().parents[2] / "shared"

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
            video.read_frames(path, FrameFormat(64))
        assert str(error.value) == expected
        return
    frames = video.read_frames(path, FrameFormat(64))
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
    frames = video.read_frames(shared(name), FrameFormat(64))
    with av.open(str(shared(name))) as container:
        stored = list(container.decode(video=0))
    (last,) = (f for f in stored if f.time - stored[0].time == pytest.approx(frames.times[-1]))
    image = last.to_image() if turn is None else last.to_image().transpose(turn)
    np.testing.assert_allclose(frames.frames[-1], plain_preprocess(image, 64), atol=3)


def test_shared_clip_with_wide_pixels_is_stretched():
    # 640 x 360 stored, 1280 x 360 shown: the bars in the middle half of the width remain.
    with av.open(str(shared("mb_sar_2x1.mp4"))) as container:
        image = next(container.decode(video=0)).to_image()
    assert video.read_frames(shared("mb_sar_2x1.mp4"), FrameFormat(64), end=0.0).frames[
        0
    ] == pytest.approx(
        plain_preprocess(image.resize((1280, 360), Image.BICUBIC), 64).astype(int), abs=24
    )
