"""Tests of the four granularities and AOSM against float64 loops over the paper's equations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from similarities import (
    TEXT_LENGTHS,
    VIDEO_LENGTHS,
    features,
    gradients_of,
    loop_matrix,
    loop_similarities,
    similarities,
)

from xclip_jax.similarity import (
    AGGREGATIONS,
    GRANULARITIES,
    aggregate_matrix,
    aosm_words,
    attend,
    granular_similarity,
    word_frame_attention,
)


def test_attention_of_a_vector_matches_hand_calculation():
    # softmax of (0, ln 3) is (1/4, 3/4); the third score is masked.
    scores, mask = jnp.array([0.0, math.log(3), 9.0]), jnp.array([True, True, False])
    assert attend(scores, mask, 0, 1.0) == pytest.approx(0.75 * math.log(3), rel=1e-6)
    assert attend(scores / 10, mask, 0, 0.1) == pytest.approx(0.075 * math.log(3), rel=1e-6)


def test_attention_of_a_matrix_matches_loops():
    """Takes four words and frames, all real or some masked."""
    scores_WxF = [
        [0.30, 0.10, 0.90, 0.20],
        [0.25, 0.25, 0.35, 0.10],
        [-0.40, 0.50, 0.10, 0.45],
        [0.95, 0.99, 0.97, 0.98],
    ]
    wide = jnp.array(scores_WxF)[:, None, :, None]
    compiled = jax.jit(aggregate_matrix, static_argnames=("aggregation", "tau"))
    for words, frames in ((4, 4), (3, 4), (3, 2), (1, 3), (2, 1)):
        real_words, real_frames = jnp.arange(4)[:, None] < words, jnp.arange(4)[:, None] < frames
        for tau in (0.01, 0.3):
            options = {"aggregation": "attention", "tau": tau}
            found = compiled(wide, real_words, real_frames, **options)
            cropped = [row[:frames] for row in scores_WxF[:words]]
            assert found.item() == pytest.approx(loop_matrix(cropped, "attention", tau), abs=2e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_granularities_match_loops(aggregation):
    for seed in range(2):
        text, video = features(seed)
        lengths = TEXT_LENGTHS, VIDEO_LENGTHS
        expected = loop_similarities(text, video, *lengths, aggregation, 0.05)
        found = similarities(text, video, GRANULARITIES, aggregation, 0.05)
        assert set(found) == set(GRANULARITIES)
        for name in GRANULARITIES:
            assert found[name].dtype == np.float32
            np.testing.assert_allclose(found[name], expected[name], atol=2e-6, err_msg=name)
            assert np.abs(found[name]).max() <= 1 + 1e-6


def test_aggregations_are_named_outer_inner():
    """Computes mean-max as the mean of maxima and max-mean as the maximum of means."""
    scores = jnp.array([[0.9, 0.1], [0.3, 0.5]])[:, None, :, None]
    real = jnp.ones((2, 1), bool)
    by_hand = {
        "max-max": 0.9,
        "mean-mean": 0.45,
        "mean-max": ((0.9 + 0.5) / 2 + (0.9 + 0.5) / 2) / 2,
        "max-mean": (0.5 + 0.6) / 2,  # words: means 0.5, 0.4; frames: 0.6, 0.3
        "maxsim": (0.9 + 0.5) / 2,
        "weighted": (0.25 * 0.9 + 0.75 * 0.5 + 0.5 * 0.9 + 0.5 * 0.5) / 2,
    }
    weights = {"word_weights": jnp.array([0.25, 0.75])[:, None, None]}
    weights["frame_weights"] = jnp.array([0.5, 0.5])[None, :, None]
    for aggregation, expected in by_hand.items():
        options = {"aggregation": aggregation, "tau": 0.01, **weights}
        found = aggregate_matrix(scores, real, real, **options).item()
        assert found == pytest.approx(expected, rel=1e-6), aggregation


@pytest.mark.parametrize("aggregation", ["maxsim", "weighted", "mean-max", "max-max"])
def test_masked_cells_win_no_maximum(aggregation):
    """Takes negative scores, above which the 0 of a masked cell would be the maximum."""
    scores = jnp.array([[-0.4, -0.4, 0.0], [-0.4, -0.4, 0.0], [0.0, 0.0, 0.0]])[:, None, :, None]
    real = jnp.array([True, True, False])[:, None]
    half = jnp.array([0.5, 0.5, 0.0])
    weights = {"word_weights": half[:, None, None], "frame_weights": half[None, :, None]}
    found = aggregate_matrix(scores, real, real, aggregation=aggregation, **weights)
    assert found.item() == pytest.approx(-0.4)


def test_weighted_needs_features_with_weights():
    text, video = features(0)
    with pytest.raises(ValueError, match="weighted"):
        granular_similarity(text.replace(weights=None), video, aggregation="weighted")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_content_of_padding_has_no_influence(aggregation):
    """Compares values and gradients bit by bit. The gradient of padding is 0."""
    text, video = features(0)
    words = np.asarray(aosm_words(text.mask))
    garbage_text = text.replace(
        words=np.where(words[..., None], text.words, 1e4),
        weights=np.where(words, text.weights, 50).astype(np.float32),
    )
    garbage_video = video.replace(
        frames=np.where(video.mask[..., None], video.frames, -1e4),
        weights=np.where(video.mask, video.weights, 50).astype(np.float32),
    )
    clean, garbage = (
        similarities(*pair, GRANULARITIES, aggregation, 0.05)
        for pair in ((text, video), (garbage_text, garbage_video))
    )
    for name in GRANULARITIES:
        np.testing.assert_array_equal(clean[name], garbage[name], name)
    value, gradients = gradients_of(text, video, aggregation)
    garbage_value, garbage_gradients = gradients_of(garbage_text, garbage_video, aggregation)
    assert value == garbage_value
    for name in gradients:
        np.testing.assert_array_equal(gradients[name], garbage_gradients[name], name)
    assert not np.asarray(gradients["words"])[~words].any()
    assert not np.asarray(gradients["frames"])[~video.mask].any()
    assert np.abs(np.asarray(gradients["frames"])[video.mask]).max() > 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_amount_of_padding_does_not_matter(aggregation):
    text, video = features(1)
    more = [(0, 0), (0, 2), (0, 0)]
    long_text = text.replace(
        words=np.pad(text.words, more, constant_values=0.3),
        mask=np.pad(text.mask, more[:2]),
        weights=np.pad(text.weights, more[:2]),
    )
    long_video = video.replace(
        frames=np.pad(video.frames, more, constant_values=0.3),
        mask=np.pad(video.mask, more[:2]),
        weights=np.pad(video.weights, more[:2]),
    )
    short = similarities(text, video, GRANULARITIES, aggregation, 0.05)
    long = similarities(long_text, long_video, GRANULARITIES, aggregation, 0.05)
    for name in GRANULARITIES:
        np.testing.assert_allclose(short[name], long[name], atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_empty_text_or_video_gives_zero_and_zero_gradient(aggregation):
    """Takes a text of start and end tokens only, an empty text, and a video without frames."""
    text, video = features(2, texts=(5, 2, 0), videos=(0, 3, 4, 1))
    found = similarities(text, video, GRANULARITIES, aggregation, 0.05)
    value, gradients = gradients_of(text, video, aggregation)
    assert np.isfinite(value)
    assert all(np.isfinite(array).all() for array in (*found.values(), *gradients.values()))
    assert not found["video_word"][1:].any()
    assert not found["frame_word"][1:].any()
    assert not found["frame_word"][:, 0].any()
    assert not found["frame_sentence"][:, 0].any()
    assert not np.asarray(gradients["words"])[1:].any()
    assert not np.asarray(gradients["frames"])[0].any()
    assert found["frame_word"][0, 1] != 0


def test_one_frame_and_one_word_give_inner_products():
    text, video = features(3, texts=(3,), videos=(1,))
    found = {}
    for aggregation in AGGREGATIONS:
        found = similarities(text, video, GRANULARITIES, aggregation, 0.01)
        word, frame = text.words[0, 1], video.frames[0, 0]
        expected = {
            "video_sentence": text.sentence[0] @ video.video[0],
            "video_word": word @ video.video[0],
            "frame_sentence": text.sentence[0] @ frame,
            "frame_word": word @ frame,
        }
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value, abs=1e-6), (aggregation, name)


def test_permuting_the_batch_permutes_the_similarities():
    text, video = features(4)
    rows, columns = np.array([2, 0, 1]), np.array([3, 1, 0, 2])
    before = similarities(text, video)
    after = similarities(
        jax.tree.map(lambda x: x[rows], text), jax.tree.map(lambda x: x[columns], video)
    )
    for name in GRANULARITIES:
        np.testing.assert_allclose(after[name], before[name][rows][:, columns], atol=1e-6)


def test_disabled_granularities_are_not_computed():
    """Puts NaN in the features of others. A granularity takes one matrix product."""
    used = {
        "video_sentence": ("sentence", "video"),
        "video_word": ("words", "video"),
        "frame_sentence": ("sentence", "frames"),
        "frame_word": ("words", "frames"),
    }
    text, video = features(5)

    def products(granularities):
        run = functools.partial(granular_similarity, granularities=granularities)
        return str(jax.make_jaxpr(run)(text, video)).count("dot_general[")

    for name, fields in used.items():
        nan = {
            field: np.full_like(getattr(source, field), np.nan)
            for source, names in ((text, ("sentence", "words")), (video, ("video", "frames")))
            for field in names
            if field not in fields
        }
        broken_text = text.replace(**{k: v for k, v in nan.items() if hasattr(text, k)})
        broken_video = video.replace(**{k: v for k, v in nan.items() if hasattr(video, k)})
        found = similarities(broken_text, broken_video, (name,))
        assert list(found) == [name]
        everything = similarities(text, video)
        np.testing.assert_allclose(found[name], everything[name], atol=1e-6)
        assert products((name,)) == 1
    assert products(GRANULARITIES) == 4
    assert products(("frame_word", "video_sentence")) == 2


def test_words_are_the_tokens_between_start_and_end():
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    expected = [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(aosm_words(mask), np.array(expected, bool))


def test_extreme_temperatures_stay_finite():
    text, video = features(6)
    lengths = TEXT_LENGTHS, VIDEO_LENGTHS
    for tau, tolerance in ((0.001, 2e-5), (1000.0, 1e-5)):
        expected = loop_similarities(text, video, *lengths, "attention", tau)
        found = similarities(text, video, GRANULARITIES, "attention", tau)
        for name in GRANULARITIES:
            np.testing.assert_allclose(found[name], expected[name], atol=tolerance)
        limit = "max-max" if tau < 1 else "mean-mean"
        bound = loop_similarities(text, video, *lengths, limit, tau)
        for name in GRANULARITIES:
            np.testing.assert_allclose(found[name], bound[name], atol=2e-3)
    value, gradients = gradients_of(text, video, "attention", 0.001)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_bfloat16_features_are_compared_in_float32():
    text, video = features(7)
    half = jax.tree.map(
        lambda x: x if x.dtype == bool else jnp.asarray(x, jnp.bfloat16), (text, video)
    )
    full = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.float32), half)
    found, expected = (similarities(*pair) for pair in (half, full))
    for name in GRANULARITIES:
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


def test_word_frame_attention_weighs_the_scores_to_the_similarity():
    text, video = features(8)
    words = np.asarray(aosm_words(text.mask))
    explain = jax.jit(functools.partial(word_frame_attention, tau=0.05))
    expected = similarities(text, video)["frame_word"]
    for t in range(len(words)):
        for v in range(len(video.mask)):
            masks = words[t], video.mask[v]
            weights = np.asarray(explain(text.words[t], video.frames[v], *masks))
            real = np.outer(*masks)
            assert weights.shape == real.shape
            assert not weights[~real].any()
            assert weights.min() >= 0
            assert weights.sum() == pytest.approx(1, abs=1e-6)
            scores = text.words[t] @ video.frames[v].T
            assert (weights * scores).sum() == pytest.approx(expected[t, v], abs=1e-6)
