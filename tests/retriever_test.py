"""Tests of the Python API with a small random model."""

import dataclasses

import av
import jax
import jaxtyping
import numpy as np
import pytest
import tiny

import xclip_jax
from xclip_jax import inference
from xclip_jax.checkpoint import load_model, save_model
from xclip_jax.cli import InputError
from xclip_jax.data.preprocess import FrameFormat, preprocess
from xclip_jax.data.video import read_frames
from xclip_jax.models import XClip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def retriever(folder):
    return xclip_jax.load(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(33):
            image = rng.integers(0, 255, (4, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def frames(count, side=tiny.SIDE, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, side, side, 3), np.uint8)


def test_features_have_the_shapes_and_masks_of_the_model(retriever):
    text = retriever.encode_text(["a red dog", "cat", "a blue cat and a red dog and a blue cat"])
    assert text.sentence.shape == (3, 32)
    assert text.words.shape == (3, 8, 32)
    assert text.mask.sum(1).tolist() == [5, 3, 8]
    video = retriever.encode_video([frames(1), frames(3), frames(9)])
    assert video.frames.shape == (3, 4, 32)
    assert video.mask.sum(1).tolist() == [1, 3, 4]
    assert retriever.similarity(text, video).shape == (3, 3)


def test_path_and_its_frames_give_equal_features(retriever, clip):
    decoded = np.stack(read_frames(clip, FrameFormat(tiny.SIDE)).frames)
    assert len(decoded) == 7  # thinned out to the model's 4
    one, other = retriever.encode_video([clip]), retriever.encode_video([decoded])
    np.testing.assert_array_equal(one.video, other.video)


def test_frames_of_another_size_are_preprocessed(retriever):
    large = frames(2, side=40)
    assert retriever.encode_video([large]).mask.sum() == 2


def test_frames_are_made_as_the_model_requires(retriever, clip):
    squash = FrameFormat(tiny.SIDE, "squash", "bilinear")
    fields = {"resize": squash.resize, "interpolation": squash.interpolation}
    config = retriever.model.config
    preprocess_config = dataclasses.replace(config.preprocess, **fields)
    model = XClip(dataclasses.replace(config, preprocess=preprocess_config))
    squashing = dataclasses.replace(retriever, model=model)
    large = frames(2, side=40)[:, :20]
    small = np.stack([preprocess(frame, squash) for frame in large])
    for video, equal in ((large, small), (clip, np.stack(read_frames(clip, squash).frames))):
        found, expected = squashing.encode_video([video]), retriever.encode_video([equal])
        np.testing.assert_array_equal(found.video, expected.video)
        assert not np.allclose(found.video, retriever.encode_video([video]).video, atol=1e-4)


def test_any_number_of_videos_matches_and_compiles_few_programs(retriever):
    videos = [frames(1 + i % 4, seed=i) for i in range(37)]
    whole = retriever.encode_video(videos)
    parts = [retriever.encode_video(videos[i : i + 3]) for i in range(0, 36, 3)]
    np.testing.assert_allclose(
        whole.video[:36], np.concatenate([part.video for part in parts]), atol=1e-5
    )
    before = inference.apply_model._cache_size()
    for count in (33, 34, 35, 36):
        retriever.encode_video(videos[:count])
    assert inference.apply_model._cache_size() <= before + 2


def test_search_ranks_by_similarity(retriever, clip):
    videos = [frames(2), clip, frames(4, seed=2)]
    matches = retriever.search("a red dog", videos, k=2)
    text, video = retriever.encode_text(["a red dog"]), retriever.encode_video(videos)
    scores = retriever.similarity(text, video)[0]
    assert [match.index for match in matches] == np.argsort(-scores)[:2].tolist()
    assert matches[0].video is videos[matches[0].index]
    assert matches[0].score == pytest.approx(scores.max(), abs=1e-4)
    assert [match.index for match in retriever.search("a red dog", video, k=9)] == np.argsort(
        -scores
    ).tolist()


def normalised():
    return np.random.default_rng(0).uniform(-1.7, 2, size=(2, 16, 16, 3))


def test_arguments_may_be_generators(retriever):
    texts, videos = ["a dog", "a cat"], [frames(2), frames(3)]
    sim_TxV = retriever.similarity(retriever.encode_text(texts), retriever.encode_video(videos))
    text = retriever.encode_text(text for text in texts)
    video = retriever.encode_video(video for video in videos)
    np.testing.assert_array_equal(retriever.similarity(text, video), sim_TxV)


def test_features_of_another_model_are_refused(retriever):
    text, video = retriever.encode_text(["a"]), retriever.encode_video([frames(2)])
    other = jax.tree.map(lambda x: x[..., :-1] if x.dtype == np.float32 else x, text)
    with pytest.raises(InputError, match=r"similarity: text features of shapes .* not of this"):
        retriever.similarity(other, video)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.encode_text("a dog"), "list of at least one str"),
        (lambda r: r.encode_text([]), "list of at least one str"),
        (lambda r: r.encode_video("dog.mp4"), "list of at least one path"),
        (lambda r: r.encode_video(["nothing.mp4"]), "nothing.mp4: "),
        (lambda r: r.encode_video([frames(2)[0]]), "must be F x H x W x 3"),
        (lambda r: r.encode_video([normalised()[:, :5]]), "frames of 5 x 16 pixels: must be uint8"),
        (lambda r: r.encode_video([frames(2), normalised()]), "all uint8 or all"),
        (lambda r: r.encode_video([frames(2).astype(np.float32)]), "are not normalised: must be"),
        (lambda r: r.encode_video([frames(2) / 255]), "frames from 0 to 0.* are not normalised"),
        (lambda r: r.encode_video([normalised() * 1e300]), "are not normalised"),
        (lambda r: r.encode_video([frames(2).astype(np.int64)]), "frames of type int64: must be"),
        (lambda r: r.encode_video([frames(2) > 9]), "frames of type bool: must be uint8"),
        (lambda r: r.encode_video([normalised() * 1j]), "frames of type complex128: must be"),
        (lambda r: r.encode_video([normalised() * 0 + 1]), "frames from 1 to 1 are not normalised"),
        (lambda r: r.encode_video([frames(2) / 255.0001 + 1e-3]), "are not normalised"),
        (lambda r: r.encode_video([(frames(2) % 9).astype(np.float16)]), "are not normalised"),
        (lambda r: r.encode_text(["a", "&nbsp;"]), "'&nbsp;' shows nothing once it is cleaned"),
        (lambda r: r.search("\u200b", [frames(2)]), "shows nothing once it is cleaned"),
        (lambda r: r.encode_text(["a"], size=0), "size = 0: must be a whole number of at least 1"),
        (lambda r: xclip_jax.load(None), "load: None: must be a path or a hub id"),
        (lambda r: r.encode_video(None), "list of at least one path"),
        (lambda r: r.encode_video([None]), "list of at least one path.*, not of NoneType"),
        (lambda r: r.encode_video(frames(2)), "list of at least one path"),
        (lambda r: r.encode_text(3), "list of at least one str"),
        (lambda r: r.encode_text(["a", 3]), "list of at least one str, not of int"),
        (lambda r: r.search("a", [frames(2)], k="2"), "must be a str and a whole number"),
    ],
)
def test_invalid_arguments_are_named(retriever, call, message, monkeypatch):
    # Users' programs do not check types at run time, as these tests do.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match=message):
        call(retriever)


def test_encode_text_without_tokenizer_names_vocab_option(folder, tmp_path, retriever):
    _, model, params, _ = load_model(folder)
    save_model(tmp_path / "model", model.config, params)
    without = xclip_jax.load(tmp_path)  # a work directory
    assert without.encode_video([frames(2)]).mask.sum() == 2
    with pytest.raises(InputError, match=r"--vocab"):
        without.encode_text(["a dog"])


def test_missing_or_corrupted_model_is_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"model\.json is missing"):
        xclip_jax.load(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(InputError, match=r"model.json: is not valid JSON: Expecting"):
        xclip_jax.load(tmp_path)
    (tmp_path / "model.json").write_text((folder / "model.json").read_text())
    with pytest.raises(InputError, match="cannot be read"):
        xclip_jax.load(tmp_path)
