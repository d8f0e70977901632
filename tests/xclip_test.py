"""Tests of the complete model: features, logits and their invariances."""

import math

import jax
import numpy as np
import pytest
import tiny

from xclip_jax.loss import contrastive_loss
from xclip_jax.models.config import ModelConfig, TemporalConfig, TextConfig, VisionConfig
from xclip_jax.models.xclip import XClip
from xclip_jax.similarity import GRANULARITIES, TextFeatures, VideoFeatures

DIM = 8
END = 19
TEXT_LENGTHS, VIDEO_LENGTHS = np.array([5, 3, 6]), np.array([3, 1])
rng = np.random.default_rng(0)
TEXT_MASK = np.arange(6) < TEXT_LENGTHS[:, None]
IDS = np.where(TEXT_MASK, rng.integers(1, 18, (3, 6)), 0)
IDS[:, 0] = 18
IDS[np.arange(3), TEXT_LENGTHS - 1] = END
FRAME_MASK = np.arange(3) < VIDEO_LENGTHS[:, None]
FRAMES = rng.integers(0, 256, (2, 3, 4, 4, 3), np.uint8)


def xclip(**changes):
    config = ModelConfig(
        vision=VisionConfig(image_size=4, patch_size=2, width=12, layers=1, heads=2),
        text=TextConfig(vocab_size=20, context_length=9, width=10, layers=1, heads=2),
        temporal=TemporalConfig(layers=1, heads=2),
        embed_dim=DIM,
        max_words=6,
        max_frames=3,
        **changes,
    )
    return XClip(config.resolve())


@pytest.fixture(scope="module")
def params():
    """Draws parameters, with a scale of 50."""
    inputs = IDS, TEXT_MASK, FRAMES, FRAME_MASK
    shapes = jax.eval_shape(xclip().init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), shapes)
    params["clip"]["logit_scale"] = np.float32(math.log(50))
    return params


def apply(params, *inputs, method, model=None):
    """Returns the outputs of a method as NumPy arrays."""
    return jax.tree.map(np.asarray, tiny.apply(model or xclip(), params, *inputs, method=method))


def encode(params, ids=IDS, text_mask=TEXT_MASK, frames=FRAMES, frame_mask=FRAME_MASK):
    text = apply(params, ids, text_mask, method="encode_text")
    return text, apply(params, frames, frame_mask, method="encode_video")


@pytest.fixture(scope="module")
def features(params):
    return encode(params)


def test_features_have_their_shapes_and_unit_norm(features):
    text, video = features
    assert isinstance(text, TextFeatures)
    assert isinstance(video, VideoFeatures)
    shapes = jax.tree.map(np.shape, (text, video))
    assert (shapes[0].sentence, shapes[0].words, shapes[0].mask) == ((3, DIM), (3, 6, DIM), (3, 6))
    assert (shapes[1].video, shapes[1].frames, shapes[1].mask) == ((2, DIM), (2, 3, DIM), (2, 3))
    np.testing.assert_array_equal(text.mask, TEXT_MASK)
    np.testing.assert_array_equal(video.mask, FRAME_MASK)
    assert text.mask.dtype == video.mask.dtype == bool
    for vectors in (text.sentence, text.words, video.video, video.frames):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-6)


def test_sentence_is_the_vector_of_the_end_token(features):
    text, _ = features
    np.testing.assert_array_equal(text.sentence, text.words[np.arange(3), TEXT_LENGTHS - 1])


def test_video_is_the_mean_of_its_real_frames(features):
    _, video = features
    for vector, frames, mask in zip(video.video, video.frames, video.mask, strict=True):
        mean = frames[mask].mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)


def test_similarity_is_the_scaled_mean_of_the_granularities(params, features):
    sim_TxV = apply(params, *features, method="similarity")
    assert sim_TxV.shape == (3, 2)
    assert sim_TxV.dtype == np.float32
    parts = apply(params, *features, method="granular_similarity")
    assert set(parts) == set(GRANULARITIES)
    np.testing.assert_allclose(sum(parts.values()) / 4, sim_TxV, atol=1e-5)
    text, video = features
    np.testing.assert_allclose(
        parts["video_sentence"], 50 * text.sentence @ video.video.T, atol=1e-4
    )
    whole = apply(params, IDS, TEXT_MASK, FRAMES, FRAME_MASK, method="__call__")
    np.testing.assert_allclose(whole, sim_TxV, atol=1e-4)


@pytest.mark.parametrize(
    "enabled", [("frame_word",), ("frame_word", "video_sentence"), GRANULARITIES[:3]]
)
def test_disabled_granularities_do_not_count(params, features, enabled):
    everything = apply(params, *features, method="granular_similarity")
    model = xclip(granularities=enabled)
    parts = apply(params, *features, method="granular_similarity", model=model)
    assert set(parts) == set(enabled)
    for name in enabled:
        np.testing.assert_allclose(parts[name], everything[name], atol=1e-4)
    mean = sum(everything[name] for name in enabled) / len(enabled)
    found = apply(params, *features, method="similarity", model=model)
    np.testing.assert_allclose(found, mean, atol=1e-4)


def test_aggregation_and_tau_change_the_similarity(params, features):
    default = apply(params, *features, method="similarity")
    for change in ({"aggregation": "mean-mean"}, {"tau": 0.5}):
        changed = apply(params, *features, method="similarity", model=xclip(**change))
        assert np.abs(changed - default).max() > 0.01


def test_logits_are_clamped_at_a_scale_of_100(params, features):
    def logits(logit_scale):
        scaled = {**params, "clip": {**params["clip"], "logit_scale": np.float32(logit_scale)}}
        return apply(scaled, *features, method="similarity")

    unscaled = logits(0)
    assert np.abs(unscaled).max() <= 1 + 1e-6
    np.testing.assert_allclose(logits(math.log(50)), 50 * unscaled, rtol=1e-5)
    np.testing.assert_allclose(logits(9), 100 * unscaled, rtol=1e-5)


def test_permuting_the_batch_permutes_the_logits(params, features):
    rows, columns = np.array([2, 0, 1]), np.array([1, 0])
    permuted = encode(params, IDS[rows], TEXT_MASK[rows], FRAMES[columns], FRAME_MASK[columns])
    before = apply(params, *features, method="similarity")
    after = apply(params, *permuted, method="similarity")
    np.testing.assert_allclose(after, before[rows][:, columns], atol=1e-4)


def test_padding_does_not_change_the_logits(params, features):
    """Adds padding of arbitrary content, compares to 1e-6 of the scale of the logits."""
    expected = apply(params, *features, method="similarity")
    wider = [(0, 0), (0, 3)]
    ids = np.where(np.pad(TEXT_MASK, wider), np.pad(IDS, wider), 7)
    frames = np.pad(FRAMES, [*wider, (0, 0), (0, 0), (0, 0)], constant_values=200)
    frames[~np.pad(FRAME_MASK, wider)] = 123
    padded = encode(params, ids, np.pad(TEXT_MASK, wider), frames, np.pad(FRAME_MASK, wider))
    assert padded[0].words.shape[1] == 9
    assert padded[1].frames.shape[1] == 6
    found = apply(params, *padded, method="similarity")
    np.testing.assert_allclose(found, expected, rtol=0, atol=50 * 1e-6)


def test_one_frame_and_one_word_give_inner_products(params):
    text, video = encode(params, IDS[1:2], TEXT_MASK[1:2], FRAMES[1:], FRAME_MASK[1:])
    np.testing.assert_allclose(video.video, video.frames[:, 0], atol=1e-6)
    parts = apply(params, text, video, method="granular_similarity")
    sentence, word = text.sentence @ video.video.T, text.words[:, 1] @ video.video.T
    for name, expected in zip(GRANULARITIES, (sentence, word, sentence, word), strict=True):
        np.testing.assert_allclose(parts[name], 50 * expected, atol=1e-4, err_msg=name)


def test_video_without_real_frames_keeps_loss_and_gradients_finite(params):
    ids = np.array([[18, 3, END, 0], [18, 5, 7, END]])
    inputs = ids, ids > 0, FRAMES[:, :2], np.array([[True, True], [False, False]])

    @jax.jit
    def loss_and_gradients(params):
        def loss(params):
            sim_TxV = xclip().apply({"params": params}, *inputs)
            return contrastive_loss(sim_TxV), sim_TxV

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, sim_TxV), gradients = loss_and_gradients(params)
    assert np.isfinite(loss)
    assert np.isfinite(sim_TxV).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.abs(gradients["clip"]["visual"]["patch"]["kernel"]).max() > 0
    np.testing.assert_allclose(sim_TxV[:, 1], 0, atol=1e-6)


def test_bfloat16_features_are_float32_and_close(params, features):
    text = apply(params, IDS, TEXT_MASK, method="encode_text", model=xclip(dtype="bfloat16"))
    assert text.words.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(text.words, axis=-1), 1, atol=1e-6)
    assert 0 < np.abs(text.words - features[0].words).max() < 0.05
