"""Tests of the gradients of similarities against automatic and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from similarities import (
    TEXT_LENGTHS,
    VIDEO_LENGTHS,
    features,
    gradient_inputs,
    gradients_of,
    loop_attention,
    loop_similarities,
)

from xclip_jax.similarity import (
    GRANULARITIES,
    TextFeatures,
    VideoFeatures,
    attend,
    granular_similarity,
)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gradient_of_attention_matches_autodiff_and_finite_differences(axis):
    rng = np.random.default_rng(axis)
    scores = rng.uniform(-1, 1, (3, 4, 5)).astype(np.float32)
    mask = rng.random((3, 4, 5)) < 0.7
    mask[0, 0, 0] = True
    upstream = rng.normal(size=np.delete(scores.shape, axis)).astype(np.float32)
    upstream = np.where(mask.any(axis), upstream, 0)  # `plain` is NaN where all is masked
    tau = 0.2

    def plain(scores):
        weights = jax.nn.softmax(jnp.where(mask, scores / tau, -1e9), axis)
        return jnp.sum(jnp.sum(weights * jnp.where(mask, scores, 0), axis) * upstream)

    def written(scores):
        return jnp.sum(attend(scores, jnp.asarray(mask), axis, tau) * upstream)

    found = np.asarray(jax.jit(jax.grad(written))(scores))
    np.testing.assert_allclose(found, jax.jit(jax.grad(plain))(scores), atol=5e-6)
    assert not found[~mask].any()

    def loops(scores):
        rows = np.moveaxis(scores, axis, -1).reshape(-1, scores.shape[axis])
        real = np.moveaxis(mask, axis, -1).reshape(rows.shape)
        pairs = zip(rows, real, upstream.ravel(), strict=True)
        return sum(u * loop_attention(list(r[m]), tau) for r, m, u in pairs if m.any())

    for place in zip(*np.nonzero(mask), strict=True):
        step = np.zeros(scores.shape)
        step[place] = 1e-5
        slope = (loops(scores + step) - loops(scores - step)) / 2e-5
        assert found[place] == pytest.approx(slope, abs=2e-4)


@pytest.mark.parametrize("aggregation", ["weighted", "maxsim", "mean-max"])
def test_gradients_of_features_match_finite_differences(aggregation):
    text, video = features(6, dim=3)
    _, found = gradients_of(text, video, aggregation)
    arrays = {name: np.asarray(array, np.float64) for name, array in gradient_inputs(text, video)}

    def total(arrays):
        sentence, words, clip, frames, *logits = arrays.values()
        pair = (
            TextFeatures(sentence, words, text.mask, logits[0]),
            VideoFeatures(clip, frames, video.mask, logits[1]),
        )
        parts = loop_similarities(*pair, TEXT_LENGTHS, VIDEO_LENGTHS, aggregation, 0.05)
        return sum(np.sum((k + 1) * np.sin(3 * parts[n])) for k, n in enumerate(GRANULARITIES))

    rng = np.random.default_rng(0)
    for name, array in arrays.items():
        for place in rng.permutation(list(np.ndindex(array.shape)))[:6]:
            values = []
            for step in (1e-6, -1e-6):
                moved = array.copy()
                moved[tuple(place)] += step
                values.append(total(arrays | {name: moved}))
            slope = (values[0] - values[1]) / 2e-6
            assert found[name][tuple(place)] == pytest.approx(slope, abs=2e-4), (name, place)


def test_gradient_by_the_temperature_matches_finite_differences():
    text, video = features(5)
    lengths = TEXT_LENGTHS, VIDEO_LENGTHS

    @jax.jit
    def total(tau):
        found = granular_similarity(text, video, tau=tau)
        return sum(jnp.sum((k + 1) * found[name]) for k, name in enumerate(GRANULARITIES))

    def loops(tau):
        found = loop_similarities(text, video, *lengths, "attention", tau)
        return sum(np.sum((k + 1) * found[name]) for k, name in enumerate(GRANULARITIES))

    for tau in (0.1, 0.5):
        slope = (loops(tau + 1e-5) - loops(tau - 1e-5)) / 2e-5
        assert jax.grad(total)(tau) == pytest.approx(slope, rel=1e-3)


def test_gradient_is_the_same_with_a_broadcast_mask():
    scores = jnp.array(np.random.default_rng(3).normal(size=(4, 2, 3)), jnp.float32)
    mask = jnp.array([True, False, True, True])[:, None, None]
    gradients = [
        jax.jit(jax.grad(lambda s, m=m: attend(s, m, 0, 0.1).sum()))(scores)
        for m in (mask, jnp.broadcast_to(mask, scores.shape))
    ]
    np.testing.assert_array_equal(*gradients)
