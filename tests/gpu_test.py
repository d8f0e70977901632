"""Tests of what only a GPU computes: `pytest --noconftest tests/gpu_test.py` on a machine with one.

The settings of all other tests are those of a CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xclip_jax.models.config import BlockConfig, ModelConfig
from xclip_jax.models.transformer import Transformer, flash_attention
from xclip_jax.similarity import TextFeatures, VideoFeatures, granular_similarity

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.mark.parametrize("length", [50, 197, 257])
def test_flash_attention_and_its_gradient_are_those_of_attention(length):
    shape = 4, 3, length, 12, 64
    query, key, value, by = jax.random.normal(jax.random.key(0), shape)

    def flash(*x):
        y = flash_attention(*(array.astype(jnp.bfloat16) for array in x))
        return jnp.sum(by * y.astype(jnp.float32))

    def plain(*x):
        return jnp.sum(by * jax.nn.dot_product_attention(*x))

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(jax.grad(plain, (0, 1, 2)))(query, key, value)
    found = jax.jit(jax.grad(flash, (0, 1, 2)))(query, key, value)
    for x, y in zip(found, expected, strict=True):
        difference = float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))
        print(f"length {length}: {difference:.1e} of the largest value")
        assert difference < 0.02  # bfloat16 has 8 bits


def test_class_token_alone_is_that_of_all_tokens():
    config = BlockConfig(width=128, layers=6, heads=2, activation="gelu")
    whole, first = (Transformer(config, "bfloat16", first_only=f) for f in (False, True))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 50, 128)), jnp.bfloat16)
    params = jax.jit(whole.init)(jax.random.key(0), x)["params"]

    def run(model):
        def loss(params):
            y = model.apply({"params": params}, x)[:, 0].astype(jnp.float32)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    for a, b in zip(*(jax.tree.leaves(run(m)) for m in (first, whole)), strict=True):
        difference = float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        print(f"{difference:.1e} of the largest value")
        assert difference < 0.05


def test_compute_type_is_bfloat16():
    assert ModelConfig().compute_dtype == "bfloat16"


def test_similarity_is_that_of_float64():
    rng = np.random.default_rng(0)

    def unit(*shape):
        x = rng.standard_normal(shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    sentence, words, videos, frames = (unit(*s, 512) for s in ((50,), (50, 8), (60,), (60, 6)))
    text = TextFeatures(sentence, words, np.ones((50, 8), bool))
    video = VideoFeatures(videos, frames, np.ones((60, 6), bool))
    options = {"granularities": ("video_sentence", "frame_word"), "aggregation": "mean-mean"}
    found = jax.jit(lambda *x: granular_similarity(*x, **options))(text, video)
    expected = {
        "video_sentence": sentence @ videos.T,
        "frame_word": words[:, 1:-1].mean(1) @ frames.mean(1).T,
    }
    for name, sim_TxV in expected.items():
        difference = np.max(np.abs(found[name] - sim_TxV))
        print(f"{name}: {difference:.1e}")
        assert difference < 1e-6
