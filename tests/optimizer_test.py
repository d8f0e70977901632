"""AdamW by hand: two rates, decay on matrices alone, warm-up, clipping."""

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xclip_jax.models.clip import TextConfig, VisionConfig
from xclip_jax.models.xclip import XClip
from xclip_jax.optimizer import decayed, encoder_mask, learning_rate_schedule, make_optimizer


def params_of(temporal):
    """The shapes of a small X-CLIP's parameters."""
    model = XClip(
        VisionConfig(image_size=4, patch_size=2, width=4, layers=1, heads=1),
        TextConfig(vocab_size=5, context_length=4, width=4, layers=1, heads=1),
        embed_dim=4,
        temporal=temporal,
        temporal_layers=1,
        temporal_heads=1,
    )
    ids, frames = np.ones((1, 4), np.int32), np.zeros((1, 2, 4, 4, 3), np.uint8)
    masks = np.ones((1, 4), bool), np.ones((1, 2), bool)
    inputs = ids, masks[0], frames, masks[1]
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def chosen(mask):
    flat = flax.traverse_util.flatten_dict(mask, sep="/")
    return {name for name, value in flat.items() if value}


BLOCK = {f"encoder/blocks/{n}/kernel" for n in ("attention/qkv", "attention/out", "fc", "proj")}
TOWERS = {
    *(f"clip/{tower}/{name}" for tower in ("visual", "textual") for name in BLOCK),
    *(f"clip/{tower}/positions" for tower in ("visual", "textual")),
    *(f"clip/{tower}/projection/kernel" for tower in ("visual", "textual")),
    "clip/visual/patch/kernel",
    "clip/textual/tokens/embedding",
}


@pytest.mark.parametrize(
    ("temporal", "new"),
    [
        ("none", set()),
        ("transformer", {f"temporal_encoder/{name}" for name in (*BLOCK, "positions")}),
        ("lstm", {"temporal_encoder/input/kernel", "temporal_encoder/hidden_kernel"}),
    ],
)
def test_matrices_alone_decay(temporal, new):
    """No bias, norm, scalar or class token; and all that is left out is a vector a layer."""
    params = params_of(temporal)
    assert chosen(decayed(params)) == TOWERS | new
    rest = chosen(jax.tree.map(lambda x: not x, decayed(params)))
    endings = {"bias", "scale", "logit_scale", "class_token", "hidden_bias"}
    assert {name.rpartition("/")[2] for name in rest} <= endings
    assert {"clip/logit_scale", "clip/visual/class_token"} <= rest


def test_the_encoder_is_what_came_from_clip():
    params = params_of("transformer")
    mask = encoder_mask(params)
    assert all(jax.tree.leaves(mask["clip"]))
    assert not any(jax.tree.leaves(mask["temporal_encoder"]))


@pytest.mark.parametrize("warmup", [0.1, 0.25])
def test_rate_rises_from_zero_and_falls_to_zero(warmup):
    total, peak = 40, 3e-4
    schedule = learning_rate_schedule(peak, total, warmup)
    rising = round(warmup * total)
    for step in range(total + 1):
        if step < rising:
            expected = peak * step / rising
        else:
            expected = peak / 2 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-9)
    assert float(schedule(0)) == 0


@pytest.mark.parametrize(
    ("total", "warmup", "expected"),
    [
        (4, 0.0, [1, 0.853553, 0.5, 0.146447, 0]),  # no warm-up: the first update counts
        (4, 0.05, [0, 1, 0.75, 0.25, 0]),  # a little: one step
        (4, 0.99, [0, 1 / 3, 2 / 3, 1, 0]),  # nearly all: a step is left to fall
        (1, 0.1, [1, 0]),  # a single step learns something
    ],
)
def test_awkward_warm_ups(total, warmup, expected):
    schedule = learning_rate_schedule(1.0, total, warmup)
    found = [float(schedule(step)) for step in range(total + 1)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_updates_equal_adamw_by_hand():
    """Five steps, one gradient far above the largest norm, against float64 NumPy."""
    rng = np.random.default_rng(0)
    shapes = {
        ("clip", "kernel"): (3, 2),
        ("clip", "bias"): (2,),
        ("temporal_encoder", "kernel"): (2, 2),
        ("temporal_encoder", "scale"): (2,),
    }
    values = {path: rng.normal(size=shape) for path, shape in shapes.items()}
    ratio, decay, b1, b2, eps, clip_norm = 0.01, 0.2, 0.9, 0.98, 1e-6, 1.0
    schedule = learning_rate_schedule(0.1, 5, 0.4)
    optimizer = make_optimizer(schedule, ratio, decay, b1, b2, eps, clip_norm)
    params = flax.traverse_util.unflatten_dict(jax.tree.map(jnp.float32, values))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    mean = dict.fromkeys(shapes, 0.0)
    square = dict.fromkeys(shapes, 0.0)
    for step, size in enumerate((0.05, 30.0, 0.01, 0.2, 5.0)):
        gradients = {path: size * rng.normal(size=shape) for path, shape in shapes.items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        for path, gradient in gradients.items():
            gradient = gradient * min(1, clip_norm / norm)
            mean[path] = b1 * mean[path] + (1 - b1) * gradient
            square[path] = b2 * square[path] + (1 - b2) * gradient**2
            corrected = mean[path] / (1 - b1 ** (step + 1))
            direction = corrected / (np.sqrt(square[path] / (1 - b2 ** (step + 1))) + eps)
            if path[1] == "kernel":
                direction = direction + decay * values[path]
            rate = (0, 0.05, 0.1, 0.075, 0.025)[step]  # 0.1 * (1 + cos(pi k / 3)) / 2 from step 2
            rate *= ratio if path[0] == "clip" else 1
            values[path] = values[path] - rate * direction
        tree = flax.traverse_util.unflatten_dict(jax.tree.map(jnp.float32, gradients))
        updates, state = update(tree, state, params)
        params = optax.apply_updates(params, updates)
        for path, value in values.items():
            np.testing.assert_allclose(params[path[0]][path[1]], value, atol=3e-6, err_msg=path)
