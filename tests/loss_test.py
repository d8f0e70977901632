"""Tests of the contrastive loss: float64 loops, blocks of texts, gradient caching."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from xclip_jax import sharding
from xclip_jax.loss import (
    LossOptions,
    channel_decorrelation,
    contrastive_loss,
    loss_and_grad,
    sigmoid_loss,
)
from xclip_jax.models import XClip, read_model_config
from xclip_jax.similarity import TextFeatures, VideoFeatures

VIDEOS = np.array([7, 3, 7, 5, 3, 7])  # of six pairs: one video three times, one twice
B, W, F = 12, 5, 3
CELLS = W * F * B  # word-frame cells of one text with every video


def logits(seed, scale=5.0):
    return (scale * np.random.default_rng(seed).normal(size=(6, 6))).astype(np.float32)


def loop_loss(sim, video=None):
    """Returns Eq. 15-17, without pairs of the same video in the denominator."""
    size, directions = len(sim), []
    for matrix in (sim, sim.T):
        losses = []
        for i in range(size):
            negatives = [j for j in range(size) if video is None or j == i or video[j] != video[i]]
            peak = max(float(matrix[i, j]) for j in negatives)
            total = sum(math.exp(float(matrix[i, j]) - peak) for j in negatives)
            losses.append(peak + math.log(total) - float(matrix[i, i]))
        directions.append(sum(losses) / size)
    return sum(directions)


def test_loss_adds_both_directions():
    assert contrastive_loss(jnp.zeros((6, 6))) == pytest.approx(2 * math.log(6))
    # Text 0 is equally similar to both videos; each video is most similar to its text.
    sim = jnp.array([[0.0, 0.0], [-1e4, 0.0]])
    assert contrastive_loss(sim) == pytest.approx(math.log(2) / 2 + math.log(2) / 2)
    assert contrastive_loss(100 * jnp.eye(6)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("video", [None, VIDEOS, np.arange(6)])
def test_loss_matches_loops(video):
    for seed in range(3):
        sim = logits(seed, 30.0)
        expected = loop_loss(sim.astype(np.float64), video)
        found = contrastive_loss(sim, None if video is None else jnp.array(video))
        assert found.dtype == jnp.float32
        assert found == pytest.approx(expected, rel=1e-5)


def test_ignored_pairs_do_not_affect_loss_or_gradient():
    ignored = (VIDEOS[:, None] == VIDEOS) & ~np.eye(6, dtype=bool)
    assert ignored.sum() == 8
    sim = logits(4)
    gradient = np.asarray(jax.grad(contrastive_loss)(sim, jnp.array(VIDEOS)))
    assert not gradient[ignored].any()
    assert (gradient[~ignored] != 0).all()
    louder = np.where(ignored, 90.0, sim).astype(np.float32)
    assert contrastive_loss(louder, jnp.array(VIDEOS)) == contrastive_loss(sim, jnp.array(VIDEOS))


@pytest.mark.parametrize("video", [None, VIDEOS])
def test_gradient_matches_finite_differences(video):
    sim = logits(5, 2.0)
    gradient = jax.grad(contrastive_loss)(sim, None if video is None else jnp.array(video))
    for place in np.ndindex(6, 6):
        step = np.zeros((6, 6))
        step[place] = 1e-5
        slope = (loop_loss(sim + step, video) - loop_loss(sim - step, video)) / 2e-5
        assert gradient[place] == pytest.approx(slope, abs=1e-5)


def loop_sigmoid(sim, video=None):
    """Returns -1/B sum_ij log sigmoid(z_ij s_ij), z = 1 on the diagonal, else -1."""
    total = 0.0
    for i, j in np.ndindex(sim.shape):
        if i == j or video is None or video[i] != video[j]:
            total += math.log1p(math.exp(-(1 if i == j else -1) * float(sim[i, j])))
    return total / len(sim)


def test_sigmoid_loss_matches_hand_calculation():
    # Four pairs, each with the logit 0: log 2 each, over B = 2.
    assert sigmoid_loss(jnp.zeros((2, 2))) == pytest.approx(2 * math.log(2))
    sure = jnp.array([[40.0, -40.0], [-40.0, 40.0]])
    assert sigmoid_loss(sure) == pytest.approx(0, abs=1e-6)
    assert sigmoid_loss(-sure, scale=0.5) == pytest.approx(0.5 * 4 * 40 / 2)


@pytest.mark.parametrize("video", [None, VIDEOS])
def test_sigmoid_loss_and_gradient_match_loops(video):
    sim, videos = logits(6), None if video is None else jnp.array(video)
    value, gradient = jax.value_and_grad(sigmoid_loss)(sim, videos)
    assert value == pytest.approx(loop_sigmoid(sim, video), rel=1e-5)
    sim = sim.astype(np.float64)
    for place in np.ndindex(6, 6):
        step = np.zeros((6, 6))
        step[place] = 1e-5
        up, down = (loop_sigmoid(s, video) for s in (sim + step, sim - step))
        assert gradient[place] == pytest.approx((up - down) / 2e-5, abs=1e-5)


def pair_features(seed=0, dim=4):
    """Returns features of B = 3 matched pairs and the masks of their words and frames."""
    rng = np.random.default_rng(seed)
    words, frames = np.arange(W) < [[3], [5], [2]], np.arange(F) < [[2], [3], [1]]
    x = (rng.normal(size=(3, n, dim)).astype(np.float32) for n in (W, F))
    text = TextFeatures(np.zeros((3, dim)), next(x), words, rng.normal(size=(3, W)))
    return text, VideoFeatures(np.zeros((3, dim)), next(x), frames), words, frames


def loop_decorrelation(text, video, words, frames, weighted):
    """Returns CDCR in float64, pair by pair."""
    pairs, shares = [], []
    for b in range(len(words)):
        real = [w for w in range(W) if words[b, w]]
        exps = [math.exp(float(text.weights[b][w])) if weighted else 1.0 for w in real]
        for w, e in zip(real, exps, strict=True):
            word = np.asarray(text.words[b][w], np.float64)
            clip = [np.asarray(f, np.float64) for f in video.frames[b][frames[b]]]
            pairs.append((word, max(clip, key=word.dot)))
            shares.append(e / sum(exps) / len(words))
    total = 0.0
    for i in range(text.words.shape[-1]):
        x, y = np.array([[word[i], frame[i]] for word, frame in pairs]).T
        x, y = x - np.dot(shares, x), y - np.dot(shares, y)
        spread = math.sqrt(np.dot(shares, x * x) * np.dot(shares, y * y))
        total += (1 - np.dot(shares, x * y) / spread) ** 2
    return total


@pytest.mark.parametrize("weighted", [False, True])
def test_channel_decorrelation_and_gradient_match_loops(weighted):
    text, video, *masks = pair_features()
    logits = text.weights if weighted else None

    def cdcr(words):
        return channel_decorrelation(text.replace(words=words, weights=logits), video, *masks)

    value, gradient = jax.jit(jax.value_and_grad(cdcr))(text.words)
    assert value == pytest.approx(loop_decorrelation(text, video, *masks, weighted), rel=1e-4)
    exact = text.words.astype(np.float64)
    for place in ((0, 1, 2), (1, 4, 0), (2, 0, 3), (0, 4, 1)):  # the last one is masked
        step = np.zeros(exact.shape)
        step[place] = 1e-6
        up, down = (
            loop_decorrelation(text.replace(words=exact + s), video, *masks, weighted)
            for s in (step, -step)
        )
        assert gradient[place] == pytest.approx((up - down) / 2e-6, abs=1e-3)


def test_channel_decorrelation_is_zero_for_equal_words_and_frames():
    text, video, *masks = pair_features()
    video = video.replace(frames=np.tile(text.words[:, :1], (1, F, 1)))
    text = text.replace(words=np.tile(text.words[:, :1], (1, W, 1)))
    assert channel_decorrelation(text, video, *masks) == pytest.approx(0, abs=1e-5)


def make(kind="softmax", **fields):
    config = tiny.make_config("")
    config.model.text.vocab_size = 50
    config.model.update({"max_words": W, "max_frames": F, "logit_bias": kind == "sigmoid"})
    config.model.update(fields)
    model = XClip(read_model_config(config.model))
    return model, tiny.make_params(model)


def compiled(model, **options):
    """Returns loss_and_grad with these options, jitted: (params, batch) -> value and gradient."""
    return jax.jit(functools.partial(loss_and_grad, model, options=LossOptions(**options)))


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "ids": rng.integers(1, 50, (B, W), np.int32),
        "text_mask": np.arange(W) < rng.integers(3, W + 1, (B, 1)),
        "frames": rng.integers(0, 256, (B, F, tiny.SIDE, tiny.SIDE, 3), np.uint8),
        "frame_mask": np.arange(F) < rng.integers(1, F + 1, (B, 1)),
        "video": np.arange(B, dtype=np.int32) // 2,
    }


def dense_loss(model, params, batch, same_video):
    """Returns the loss by one call of the model on the whole batch."""
    inputs = (batch["ids"], batch["text_mask"], batch["frames"], batch["frame_mask"])
    sim = model.apply({"params": params}, *inputs)
    return contrastive_loss(sim, batch["video"] if same_video == "ignore" else None, scale=0.5)


def assert_same(found, expected):
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * scale)
    jax.tree.map(close, jax.device_get(found), jax.device_get(expected))


WAYS = {
    "none": {},
    "blocks": {"block_cells": 3 * CELLS},
    "micro-batches": {"micro_batch": 4},
    "both": {"block_cells": CELLS, "micro_batch": 6},
}


@pytest.mark.parametrize(
    ("fields", "same_video", "ways"),
    [
        ({}, "ignore", ["none", "both"]),
        pytest.param({}, "ignore", ["blocks", "micro-batches"], marks=pytest.mark.slow),
        ({"preset": "official"}, "negative", ["both"]),
        ({"head": "tight_transformer"}, "ignore", ["both"]),
    ],
)
def test_blocks_and_micro_batches_keep_value_and_gradient(fields, same_video, ways):
    model, params = make(**fields)
    batch = make_batch()
    expected = jax.jit(jax.value_and_grad(functools.partial(dense_loss, model)), static_argnums=2)
    value, gradient = expected(params, batch, same_video)
    sim = tiny.apply(model, params, *(batch[k] for k in list(batch)[:4]))
    right = batch["video"][np.argmax(sim, 1)] == batch["video"]
    for way in ways:
        options = {"same_video": same_video, "scale": 0.5, **WAYS[way]}
        (loss, accuracy), found = compiled(model, **options)(params, batch)
        assert float(loss) == pytest.approx(float(value), abs=1e-5)
        assert_same(found, gradient)
        assert float(accuracy) == pytest.approx(right.mean())


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"tau_learned": True}, {}),
        ({"aggregation": "weighted"}, {"kind": "sigmoid", "each_granularity": True, "cdcr": 500.0}),
    ],
)
def test_two_devices_and_blocks_give_the_same_value_and_gradient(fields, options):
    model, params = make(options.get("kind", "softmax"), **fields)
    batch, mesh = make_batch(), sharding.make_mesh(2)
    (value, _), gradient = compiled(model, **options)(params, batch)
    placed = sharding.shard_batch(batch, mesh)
    (loss, _), found = compiled(model, mesh=mesh, **WAYS["both"], **options)(params, placed)
    assert float(loss) == pytest.approx(float(value), rel=1e-6, abs=1e-5)
    assert_same(found, gradient)
    for name in ("logit_bias", "log_tau", "word_weights", "frame_weights"):
        if name in params:
            assert any(np.any(x) for x in jax.tree.leaves(found[name])), name


def test_loss_of_each_granularity_is_their_mean():
    model, params = make()
    batch = make_batch()
    inputs = [batch[k] for k in list(batch)[:4]]
    text = tiny.apply(model, params, *inputs[:2], method="encode_text")
    video = tiny.apply(model, params, *inputs[2:], method="encode_video")
    parts = tiny.apply(model, params, text, video, method="granular_similarity")
    expected = np.mean([loop_loss(np.asarray(x, np.float64)) for x in parts.values()])
    (loss, _), _ = compiled(model, each_granularity=True)(params, batch)
    assert len(parts) == 4
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_dropout_depends_on_the_key_only():
    """Drops out inputs of the tight head, equally in each call and on two devices."""
    model, params = make(head="tight_transformer")
    batch, keys = make_batch(), jax.random.split(jax.random.key(0), 2)
    step, mesh = compiled(model), sharding.make_mesh(2)
    (without, _), _ = step(params, batch)
    (first, _), gradient = step(params, batch, dropout_key=keys[0])
    (second, _), _ = step(params, batch, dropout_key=keys[1])
    assert len({float(x) for x in (without, first, second)}) == 3
    placed = sharding.shard_batch(batch, mesh)
    (loss, _), found = compiled(model, mesh=mesh)(params, placed, dropout_key=keys[0])
    assert float(loss) == pytest.approx(float(first), abs=1e-5)
    assert_same(found, gradient)
    model, params = make()
    (plain, _), _ = compiled(model)(params, batch)
    (keyed, _), _ = compiled(model)(params, batch, dropout_key=keys[0])
    assert plain == keyed


def shapes_in(text, *shapes):
    return [shape for shape in shapes if shape in text]


def test_blocks_avoid_the_word_frame_tensor_of_the_batch():
    model, params = make()
    whole, block = f"f32[{W},{B},{F},{B}]", f"f32[{W},3,{F},{B}]"

    def program(**way):
        lowered = compiled(model, **way).lower(params, make_batch())
        return lowered.compiler_ir(dialect="hlo").as_hlo_text()

    assert shapes_in(program(), whole, block) == [whole]
    assert shapes_in(program(**WAYS["blocks"]), whole, block) == [block]


def test_micro_batches_take_less_memory():
    """Compares memory, as only one micro-batch's activations of the towers exist at a time."""
    model, params = make()

    def temporary(**way):
        lowered = compiled(model, **way).lower(params, make_batch())
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(micro_batch=2) < 0.5 * temporary()
