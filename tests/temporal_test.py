"""Tests of the temporal encoders: dependence between frames, padding, numeric types."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xclip_jax.models.config import ModelConfig, TemporalConfig, TextConfig, VisionConfig
from xclip_jax.models.temporal import TemporalLSTM, TemporalTransformer
from xclip_jax.models.xclip import XClip

DIM = 12
FRAMES = np.random.default_rng(0).normal(size=(3, 5, DIM)).astype(np.float32)
MASK = np.arange(5) < np.array([[5], [2], [1]])
CONFIG = ModelConfig(
    vision=VisionConfig(image_size=4, patch_size=2, width=6, layers=1, heads=1),
    text=TextConfig(vocab_size=5, context_length=9, width=4, layers=1, heads=1),
    temporal=TemporalConfig(layers=2, heads=3),
    embed_dim=DIM,
)
ENCODERS = {"transformer": TemporalTransformer(CONFIG), "lstm": TemporalLSTM(CONFIG)}


def randomized(params):
    """Returns random parameters of the same shapes, none of them near 0."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), params)


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    """Returns a name and a compiled function (frames, mask) -> encoded frames."""
    model = ENCODERS[request.param]
    params = jax.eval_shape(model.init, jax.random.key(0), FRAMES, MASK)["params"]
    variables = {"params": randomized(params)}
    return request.param, jax.jit(lambda x, mask: model.apply(variables, x, mask))


def test_padded_frames_do_not_influence_real_ones(encoder):
    _, encode = encoder
    real = MASK[..., None]
    clean = np.asarray(encode(FRAMES, MASK))
    garbage = np.asarray(encode(np.where(real, FRAMES, 50), MASK))
    assert clean.shape == FRAMES.shape
    np.testing.assert_array_equal(clean[MASK], garbage[MASK])

    def total(frames):
        return jnp.sum(jnp.where(real, jnp.sin(encode(frames, MASK)), 0))

    gradient = np.asarray(jax.grad(total)(FRAMES))
    assert not gradient[~MASK].any()
    assert np.abs(gradient[MASK]).min() > 0


def test_amount_of_padding_does_not_matter(encoder):
    _, encode = encoder
    clean = encode(FRAMES, MASK)
    longer = encode(np.pad(FRAMES, [(0, 0), (0, 3), (0, 0)]), np.pad(MASK, [(0, 0), (0, 3)]))
    np.testing.assert_allclose(longer[:, :5][MASK], clean[MASK], atol=2e-6)
    alone = encode(FRAMES[1:2, :2], MASK[1:2, :2])
    np.testing.assert_allclose(alone[0], clean[1, :2], atol=2e-6)


def test_transformer_attends_both_ways_and_lstm_backwards(encoder):
    """Checks gradients, which are also 0 between videos."""
    name, encode = encoder

    def frame_sums(frames):
        return jnp.sum(jnp.sin(encode(frames, MASK)), 2)

    influence = np.abs(jax.jacrev(frame_sums)(FRAMES)).max(-1)  # V x F by V x F
    seen = np.ones((5, 5), bool) if name == "transformer" else np.tril(np.ones((5, 5), bool))
    np.testing.assert_array_equal(influence[0, :, 0] > 0, seen)
    assert not influence[0, :, 1:].any()


def test_lstm_matches_loop_in_numpy():
    """Compares with PyTorch's nn.LSTM: gates input, forget, candidate, output, and two biases."""
    rng = np.random.default_rng(2)
    params = {
        "input": {"kernel": rng.normal(size=(DIM, 4 * DIM)) / 3, "bias": rng.normal(size=4 * DIM)},
        "hidden_kernel": rng.normal(size=(DIM, 4 * DIM)) / 3,
        "hidden_bias": rng.normal(size=4 * DIM),
    }
    single = jax.tree.map(lambda x: x.astype(np.float32), params)
    found = jax.jit(TemporalLSTM(CONFIG).apply)({"params": single}, FRAMES, MASK)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for v, frames in enumerate(FRAMES.astype(np.float64)):
        hidden, cell = np.zeros(DIM), np.zeros(DIM)
        for f, frame in enumerate(frames):
            gates = frame @ params["input"]["kernel"] + params["input"]["bias"]
            gates += hidden @ params["hidden_kernel"] + params["hidden_bias"]
            i, forget, g, o = (gates[k * DIM : (k + 1) * DIM] for k in range(4))
            cell = sigmoid(forget) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
            # The output for padding is 0, as with a packed sequence in PyTorch.
            np.testing.assert_allclose(found[v, f], hidden * MASK[v, f], atol=2e-6)


@pytest.mark.parametrize("temporal", ["none", *ENCODERS])
def test_order_of_frames_matters_only_with_temporal_encoder(temporal):
    config = dataclasses.replace(CONFIG, temporal=TemporalConfig(temporal, layers=1, heads=2))
    model = XClip(config.resolve())
    images = np.random.default_rng(3).normal(size=(1, 4, 4, 4, 3)).astype(np.float32)
    mask = np.array([[True, True, True, False]])
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), images, mask, method="encode_video")
    )["params"]
    assert ("temporal_encoder" in params) == (temporal != "none")
    variables = {"params": randomized(params)}
    encode = jax.jit(lambda x: model.apply(variables, x, mask, method="encode_video").video)
    difference = np.abs(encode(images) - encode(images[:, [2, 0, 1, 3]])).max()
    if temporal == "none":
        assert difference < 1e-6
    else:
        assert difference > 1e-3


def test_bfloat16_keeps_float32_parameters():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    for model in (TemporalTransformer(config), TemporalLSTM(config)):
        half = jnp.asarray(FRAMES, jnp.bfloat16)
        found, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), half, MASK)
        assert found.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
