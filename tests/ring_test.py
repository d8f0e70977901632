"""Tests of the ring of devices that compares all texts with all videos."""

import functools

import jax
import jax.numpy as jnp
import loss_test
import numpy as np
import pytest
from collectives import collective_bytes

from xclip_jax import sharding
from xclip_jax.loss import LossOptions, encode_batch, loss_of_features
from xclip_jax.ring import compare_in_blocks, compare_in_ring
from xclip_jax.similarity import TextFeatures, VideoFeatures

PAIRS, DIM, WORDS, FRAMES = 8, 3, 5, 2


def features():
    rng = np.random.default_rng(0)
    text, words, video, frames = (
        jnp.array(rng.normal(size=(PAIRS, *shape)), jnp.float32)
        for shape in ((DIM,), (WORDS, DIM), (DIM,), (FRAMES, DIM))
    )
    words_mask, frames_mask = (jnp.array(rng.random((PAIRS, n)) < 0.7) for n in (WORDS, FRAMES))
    return TextFeatures(text, words, words_mask), VideoFeatures(video, frames, frames_mask)


def compare(params, text, video, key):
    """Returns logits of two granularities, linear in the parameters, texts and videos."""
    by_mean = text.sentence @ video.video.T
    words, frames = (jnp.where(m[..., None], x, 0).sum(1) for x, m in masked(text, video))
    sim_GxTxV = params["scale"] * jnp.stack([by_mean, words @ frames.T])
    return sim_GxTxV if key is None else sim_GxTxV * jax.random.bernoulli(key, shape=by_mean.shape)


def masked(text, video):
    return (text.words, text.mask), (video.frames, video.mask)


def ring(key=None, limit=2):
    """Returns (logits, their gradient by a random cotangent, the cotangent) on two devices."""
    in_blocks = functools.partial(compare_in_blocks, compare, limit)
    cotangent = jnp.array(np.random.default_rng(1).normal(size=(2, PAIRS, PAIRS)), jnp.float32)

    @jax.jit
    def run(params, text, video):
        def total(scale, *floats):
            inputs = (x.replace(**parts) for x, parts in zip((text, video), floats, strict=True))
            sim = compare_in_ring(
                in_blocks, sharding.make_mesh(2), ({"scale": scale}, *inputs, key)
            )
            return jnp.sum(sim * cotangent), sim

        floats = (
            {"sentence": text.sentence, "words": text.words},
            {"video": video.video, "frames": video.frames},
        )
        gradient, sim = jax.grad(total, (0, 1, 2), has_aux=True)(params["scale"], *floats)
        return sim, gradient, floats

    sim, gradient, floats = run({"scale": jnp.float32(1.5)}, *features())
    return sim, gradient, (jnp.float32(1.5), *floats), cotangent


@pytest.mark.parametrize("limit", [2, 4])
def test_ring_matches_dense_logits_and_gradient(limit):
    sim, gradient, floats, cotangent = ring(limit=limit)
    text, video = features()

    def total(scale, by_text, by_video):
        inputs = {"scale": scale}, text.replace(**by_text), video.replace(**by_video), None
        return jnp.sum(compare(*inputs) * cotangent)

    dense = compare({"scale": 1.5}, text, video, None)
    np.testing.assert_allclose(sim, dense, rtol=1e-6, atol=1e-6)
    expected = jax.grad(total, (0, 1, 2))(*floats)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, jax.device_get(gradient), jax.device_get(expected))


def test_backward_pass_drops_what_the_forward_pass_dropped():
    sim, (by_scale, by_text, by_video), (scale, text, video), cotangent = ring(jax.random.key(0))
    dense, *_ = ring()
    dropped = np.asarray(sim[0]) == 0
    assert 0.2 < dropped.mean() < 0.8
    np.testing.assert_allclose(sim, np.where(dropped, 0, dense), rtol=1e-6)
    rows = {row.tobytes() for row in dropped.reshape(16, 4)}
    assert len(rows) > 8  # blocks have keys of their own
    # Logits are linear in each input, so that inputs x gradients = logits x cotangents.
    total = pytest.approx(float(jnp.sum(sim * cotangent)), rel=1e-5)
    assert float(scale * by_scale) == total
    for x, gradient in ((text, by_text), (video, by_video)):
        assert sum(float(jnp.sum(x[k] * gradient[k])) for k in x) == total


def test_devices_send_videos_and_gather_no_features():
    batch, size = loss_test.make_batch(), loss_test.B
    model, params = loss_test.make(aggregation="weighted")
    mesh = sharding.make_mesh(2)
    place = functools.partial(jax.device_put, device=sharding.over_batch(mesh))
    encoded = encode_batch(model, params, batch)
    inputs = params, place(encoded), place(batch)
    options = LossOptions(mesh=mesh, block_cells=1, same_video="ignore", cdcr=1.0)
    loss = functools.partial(loss_of_features, model, options=options)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    moved = collective_bytes(gradient.lower(*inputs).compile().as_text())
    *_, video, frames, weights = encoded
    floats, mask = (video.size + frames.size + weights.size) // 2, size * loss_test.F // 2
    # In both steps of each pass the videos; their gradients in the second pass and once more home.
    assert moved["collective-permute"] == 4 * (4 * floats + mask) + 3 * 4 * floats
    assert moved["all-gather"] <= 4 * 4 * size  # the videos' numbers
    assert moved["all-reduce"] < 4 * 1000
