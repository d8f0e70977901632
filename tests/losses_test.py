"""The contrastive loss against float64 loops, and what ignoring pairs of one video means."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xclip_jax.loss import contrastive_loss

VIDEOS = np.array([7, 3, 7, 5, 3, 7])  # of six pairs: one video three times, one twice


def logits(seed, scale=5.0):
    return (scale * np.random.default_rng(seed).normal(size=(6, 6))).astype(np.float32)


def loop_loss(sim, video=None):
    """Eq. 15-17; a pair of the same video is left out of the sum in the denominator."""
    size, directions = len(sim), []
    for matrix in (sim, sim.T):
        losses = []
        for i in range(size):
            rivals = [j for j in range(size) if video is None or j == i or video[j] != video[i]]
            peak = max(float(matrix[i, j]) for j in rivals)
            total = sum(math.exp(float(matrix[i, j]) - peak) for j in rivals)
            losses.append(peak + math.log(total) - float(matrix[i, i]))
        directions.append(sum(losses) / size)
    return sum(directions)


def test_both_directions_are_added():
    """Equal logits: each direction costs log B; one-sided confusion costs only its direction."""
    assert contrastive_loss(jnp.zeros((6, 6))) == pytest.approx(2 * math.log(6))
    # Text 0 likes both videos alike, and every video knows its text.
    sim = jnp.array([[0.0, 0.0], [-1e4, 0.0]])
    assert contrastive_loss(sim) == pytest.approx(math.log(2) / 2 + math.log(2) / 2)
    assert contrastive_loss(100 * jnp.eye(6)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("video", [None, VIDEOS, np.arange(6)])
def test_equals_the_loops(video):
    for seed in range(3):
        sim = logits(seed, 30.0)
        expected = loop_loss(sim.astype(np.float64), video)
        found = contrastive_loss(sim, None if video is None else jnp.array(video))
        assert found.dtype == jnp.float32
        assert found == pytest.approx(expected, rel=1e-5)


def test_ignored_pairs_have_neither_influence_nor_gradient():
    ignored = (VIDEOS[:, None] == VIDEOS) & ~np.eye(6, dtype=bool)
    assert ignored.sum() == 8
    sim = logits(4)
    gradient = np.asarray(jax.grad(contrastive_loss)(sim, jnp.array(VIDEOS)))
    assert not gradient[ignored].any()
    assert (gradient[~ignored] != 0).all()
    louder = np.where(ignored, 90.0, sim).astype(np.float32)
    assert contrastive_loss(louder, jnp.array(VIDEOS)) == contrastive_loss(sim, jnp.array(VIDEOS))


@pytest.mark.parametrize("video", [None, VIDEOS])
def test_gradient_by_finite_differences(video):
    sim = logits(5, 2.0)
    gradient = jax.grad(contrastive_loss)(sim, None if video is None else jnp.array(video))
    for place in np.ndindex(6, 6):
        step = np.zeros((6, 6))
        step[place] = 1e-5
        slope = (loop_loss(sim + step, video) - loop_loss(sim - step, video)) / 2e-5
        assert gradient[place] == pytest.approx(slope, abs=1e-5)
