"""Blocks of texts and micro-batches change memory, not values or gradients."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from xclip_jax import sharding
from xclip_jax.loss import Contrast, contrastive_loss
from xclip_jax.models import build_model, resolve

B, W, F = 12, 5, 3
CELLS = W * F * B  # word-frame cells of one text with every video


def make(**fields):
    config = tiny.make_config("")
    config.model.text.vocab_size = 50
    config.model.update({"max_words": W, "max_frames": F, **fields})
    architecture = resolve(json.loads(config.model.to_json()))
    model = build_model(architecture)
    return model, tiny.make_params(model, architecture)


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "ids": rng.integers(1, 50, (B, W), np.int32),
        "text_mask": np.arange(W) < rng.integers(3, W + 1, (B, 1)),
        "frames": rng.integers(0, 256, (B, F, tiny.SIDE, tiny.SIDE, 3), np.uint8),
        "frame_mask": np.arange(F) < rng.integers(1, F + 1, (B, 1)),
        "video": np.arange(B, dtype=np.int32) // 2,
    }


def dense(model, params, batch, same_video):
    """The loss written out: one call of the model on the whole batch."""
    inputs = (batch["ids"], batch["text_mask"], batch["frames"], batch["frame_mask"])
    sim = model.apply({"params": params}, *inputs)
    return contrastive_loss(sim, batch["video"] if same_video == "ignore" else None, 0.5)


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
        ({}, "ignore", WAYS),
        ({"preset": "official"}, "negative", ["both"]),
        ({"head": "tight_transformer"}, "ignore", ["both"]),
    ],
)
def test_value_and_gradient_are_those_of_the_dense_loss(fields, same_video, ways):
    model, params = make(**fields)
    batch = make_batch()
    expected = jax.jit(jax.value_and_grad(functools.partial(dense, model)), static_argnums=2)
    value, gradient = expected(params, batch, same_video)
    sim = tiny.apply(model, params, *(batch[k] for k in list(batch)[:4]))
    right = batch["video"][np.argmax(sim, 1)] == batch["video"]
    for way in ways:
        contrast = Contrast(model, same_video, 0.5, **WAYS[way])
        (loss, accuracy), found = jax.jit(contrast.value_and_grad)(params, batch)
        assert float(loss) == pytest.approx(float(value), abs=1e-5)
        assert_same(found, gradient)
        assert float(accuracy) == pytest.approx(right.mean())


def test_over_two_devices():
    model, params = make()
    batch, mesh = make_batch(), sharding.make_mesh(2)
    (value, _), gradient = jax.jit(Contrast(model).value_and_grad)(params, batch)
    contrast = Contrast(model, mesh=mesh, **WAYS["both"])
    placed = sharding.shard_batch(batch, mesh)
    (loss, _), found = jax.jit(contrast.value_and_grad)(params, placed)
    assert float(loss) == pytest.approx(float(value), abs=1e-5)
    assert_same(found, gradient)


def shapes_in(text, *wanted):
    return [shape for shape in wanted if shape in text]


def test_no_tensor_of_all_words_and_frames_is_left():
    """The word-frame tensor of the batch, W x B x F x B, is in the dense program alone."""
    model, params = make()
    whole, block = f"f32[{W},{B},{F},{B}]", f"f32[{W},3,{F},{B}]"

    def program(**way):
        lowered = jax.jit(Contrast(model, **way).value_and_grad).lower(params, make_batch())
        return lowered.compiler_ir(dialect="hlo").as_hlo_text()

    assert shapes_in(program(), whole, block) == [whole]
    assert shapes_in(program(**WAYS["blocks"]), whole, block) == [block]


def test_micro_batches_take_less_memory():
    """Of the towers' activations there is one micro-batch's at a time."""
    model, params = make()

    def temporary(**way):
        compiled = jax.jit(Contrast(model, **way).value_and_grad).lower(params, make_batch())
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporary(micro_batch=2) < 0.5 * temporary()
