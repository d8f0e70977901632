"""Tests of both optimizers against NumPy: rates, weight decay, schedules, clipping, freezing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import flatten, make_options, params_of, random_tree, slices, true_names, unflatten

from xclip_jax.cli import InputError
from xclip_jax.config import OptimizerConfig, get_config, validate
from xclip_jax.optimizer import (
    bert_schedule,
    decay_mask,
    encoder_mask,
    learning_rate_schedule,
    make_optimizer,
    non_bias_mask,
    store_params,
)

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
def test_only_matrices_decay_with_adamw(temporal, new):
    params = params_of(temporal)
    assert true_names(decay_mask(params)) == TOWERS | new
    rest = true_names(jax.tree.map(lambda x: not x, decay_mask(params)))
    endings = {"bias", "scale", "logit_scale", "class_token", "hidden_bias"}
    assert {name.rpartition("/")[2] for name in rest} <= endings
    assert {"clip/logit_scale", "clip/visual/class_token"} <= rest


@pytest.mark.parametrize("temporal", ["transformer", "lstm"])
def test_all_except_biases_decay_with_bert_adam(temporal):
    """Decays the scales of norms too, because the release calls them ln_*, not LayerNorm."""
    params = params_of(temporal)
    exempt = true_names(jax.tree.map(lambda x: not x, non_bias_mask(params)))
    assert exempt == {name for name in flatten(params) if name.endswith("bias")}
    # PyTorch's LSTM calls its biases bias_ih_l0 and bias_hh_l0.
    assert ("temporal_encoder/hidden_bias" in exempt) == (temporal == "lstm")
    always = ("logit_scale", "visual/class_token", "visual/ln_post/norm/scale", "textual/positions")
    assert {f"clip/{name}" for name in always} <= true_names(non_bias_mask(params))


def test_unused_logit_scale_of_a_pair_transformer_does_not_decay():
    params = params_of("transformer") | {"pair_encoder": {"positions": np.ones(3)}}
    assert not non_bias_mask(params)["clip"]["logit_scale"]
    assert non_bias_mask(params)["clip"]["textual"]["positions"]


def test_encoder_mask_is_everything_under_clip():
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
        (4, 0.0, [1, 0.853553, 0.5, 0.146447, 0]),  # no warmup: the first update counts
        (4, 0.05, [0, 1, 0.75, 0.25, 0]),  # at least one step
        (4, 0.99, [0, 1 / 3, 2 / 3, 1, 0]),  # one step remains for the cosine
        (1, 0.1, [1, 0]),  # a single step is not all warmup
    ],
)
def test_extreme_warmups_leave_a_step_to_each_part(total, warmup, expected):
    schedule = learning_rate_schedule(1.0, total, warmup)
    found = [float(schedule(step)) for step in range(total + 1)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_updates_match_adamw_in_numpy():
    """Takes five steps, one of them with a gradient far above the largest norm."""
    rng = np.random.default_rng(0)
    shapes = {
        "clip/kernel": (3, 2),
        "clip/bias": (2,),
        "temporal_encoder/kernel": (2, 2),
        "temporal_encoder/scale": (2,),
    }
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    ratio, decay, b1, b2, eps, clip_norm = 0.01, 0.2, 0.9, 0.98, 1e-6, 1.0
    options = make_options(0.1, ratio, decay, 0.4, clip_norm)
    schedule, optimizer = make_optimizer(OptimizerConfig(name="adamw", **options), 5)
    assert [float(schedule(step)) for step in (0, 1, 2)] == pytest.approx([0, 0.05, 0.1])
    params = unflatten(values)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    mean, square = dict.fromkeys(shapes, 0.0), dict.fromkeys(shapes, 0.0)
    for step, size in enumerate((0.05, 30.0, 0.01, 0.2, 5.0)):
        gradients = {name: size * rng.normal(size=shape) for name, shape in shapes.items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        for name, gradient in gradients.items():
            gradient = gradient * min(1, clip_norm / norm)
            mean[name] = b1 * mean[name] + (1 - b1) * gradient
            square[name] = b2 * square[name] + (1 - b2) * gradient**2
            corrected = mean[name] / (1 - b1 ** (step + 1))
            direction = corrected / (np.sqrt(square[name] / (1 - b2 ** (step + 1))) + eps)
            if name.endswith("kernel"):
                direction = direction + decay * values[name]
            rate = (0, 0.05, 0.1, 0.075, 0.025)[step]  # 0.1 * (1 + cos(pi k / 3)) / 2 from step 2
            rate *= ratio if name.startswith("clip/") else 1
            values[name] = values[name] - rate * direction
        updates, state = update(unflatten(gradients), state, params)
        params = optax.apply_updates(params, updates)
        for name, value in values.items():
            np.testing.assert_allclose(flatten(params)[name], value, atol=3e-6, err_msg=name)


# 0.5 * (1 + cos(pi x)) at x = 0, 0.1, 0.2, ...
COSINE = [1, 0.975528, 0.904508, 0.793893, 0.654508, 0.5, 0.345492, 0.206107, 0.095492, 0.024472, 0]


@pytest.mark.parametrize(
    ("total", "warmup", "expected"),
    [
        (10, 0.1, [0, *COSINE[1:]]),
        (10, 0.25, [0, 0.4, 0.8, *COSINE[3:]]),
        (10, 0.3, [0, 1 / 3, 2 / 3, *COSINE[3:]]),
        (10, 0.0, COSINE),
        (30, 0.1, [0, 1 / 3, 2 / 3, 0.975528]),  # 0.1 * 30 is above 3, yet 3 / 30 not below 0.1
        (3, 0.9, [0, 0.370370, 0.740741, 0]),
        (1, 0.1, [0, 0]),
    ],
)
def test_bert_schedule_matches_hand_calculation(total, warmup, expected):
    """Passes the step as a number, and as an array to a jitted function."""
    schedule = bert_schedule(2.0, total, warmup)
    found = [float(schedule(step)) for step in range(len(expected))]
    assert found == pytest.approx([2 * rate for rate in expected], abs=2e-6)
    jitted = [float(jax.jit(schedule)(jnp.int32(step))) for step in range(len(expected))]
    assert jitted == pytest.approx(found, abs=1e-6)


TORCH_NAMES = {
    "clip/logit_scale": "clip.logit_scale",
    "clip/visual/class_token": "clip.visual.class_embedding",
    "clip/visual/encoder/blocks/attention/qkv/kernel": "clip.visual.{}.attn.in_proj_weight",
    "clip/visual/encoder/blocks/attention/qkv/bias": "clip.visual.{}.attn.in_proj_bias",
    "clip/visual/encoder/blocks/ln_1/norm/scale": "clip.visual.{}.ln_1.weight",
    "temporal_encoder/encoder/blocks/fc/kernel": "transformerClip.{}.mlp.c_fc.weight",
    "temporal_encoder/encoder/blocks/fc/bias": "transformerClip.{}.mlp.c_fc.bias",
    "temporal_encoder/positions": "frame_position_embeddings.weight",
    "temporal_encoder/input/bias": "lstm_visual.bias_ih_l0",
    "temporal_encoder/hidden_bias": "lstm_visual.bias_hh_l0",
}


def to_torch(tree):
    """Returns a dict of PyTorch name -> tensor."""
    tensors = {}
    for name, value in flatten(tree).items():
        torch_name = TORCH_NAMES[name]
        if "{}" in torch_name:
            tensors |= {torch_name.format(layer): part for layer, part in enumerate(value)}
        else:
            tensors[torch_name] = value
    return tensors


class BertAdam:
    """The release's optimizer in float64. `clipped` records which clipping took effect."""

    def __init__(self, tensors, total, options):
        self.values = {name: np.float64(value) for name, value in tensors.items()}
        self.mean, self.square = dict.fromkeys(tensors, 0.0), dict.fromkeys(tensors, 0.0)
        self.total, self.options = total, options
        self.steps, self.clipped = 0, set()

    def clip(self, what, gradients, max_norm):
        norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients))
        factor = max_norm / (norm + 1e-6)
        self.clipped |= {what} if factor < 1 else set()
        return [gradient * min(1, factor) for gradient in gradients]

    def step(self, gradients):
        o = self.options
        gradients = [np.float64(gradients[name]) for name in self.values]
        gradients = self.clip("all", gradients, o["clip_norm"])
        x = self.steps / self.total
        factor = x / o["warmup"] if x < o["warmup"] else 0.5 * (1 + math.cos(math.pi * x))
        for name, gradient in zip(self.values, gradients, strict=True):
            [gradient] = self.clip("tensors", [gradient], 1.0)
            self.mean[name] = o["b1"] * self.mean[name] + (1 - o["b1"]) * gradient
            self.square[name] = o["b2"] * self.square[name] + (1 - o["b2"]) * gradient**2
            update = self.mean[name] / (np.sqrt(self.square[name]) + o["eps"])
            if not ("bias" in name or "LayerNorm" in name):
                update = update + o["weight_decay"] * self.values[name]
            rate = o["encoder_lr"] if name.startswith("clip.") else o["lr"]
            self.values[name] = self.values[name] - factor * rate * update
        self.steps += 1


@pytest.mark.parametrize(
    ("clip_norm", "sizes", "clipped"),
    [
        # Tiny gradients test epsilon. At 1.0 the global clipping makes the other one redundant.
        (1.0, (1e-6, 1e-5, 1e-6, 3e-6, 1e-6), set()),
        (1.0, (0.5, 100.0, 0.01, 1e-6, 0.1), {"all"}),
        (1e9, (0.3, 100.0, 0.3, 0.01, 30.0), {"tensors"}),
        (6.0, (0.3, 100.0, 0.3, 0.01, 30.0), {"all", "tensors"}),
    ],
)
def test_updates_match_bert_adam_in_numpy(clip_norm, sizes, clipped):
    params = random_tree(0)
    options = make_options(0.1, 0.05, 0.2, 0.3, clip_norm)
    reference = BertAdam(to_torch(params), 5, options)
    schedule, optimizer = make_optimizer(OptimizerConfig(name="bert_adam", **options), 5)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    before = params
    for step, size in enumerate(sizes):
        gradients = random_tree(step + 1, size)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        reference.step(to_torch(gradients))
        for name, value in to_torch(params).items():
            np.testing.assert_allclose(value, reference.values[name], atol=2e-6, err_msg=name)
        if step == 0:
            assert jax.tree.all(jax.tree.map(np.array_equal, params, before))
    assert reference.clipped == clipped
    assert float(schedule(0)) == 0


def half(x):
    return np.asarray(x).astype(np.float16).astype(np.float32)


def test_float16_updates_are_rounded_line_by_line():
    """Compares with NumPy, bit by bit: every line of PyTorch's BertAdam rounds its result."""
    options = make_options(1e-2, 1e-3, 0.2, 0.0, 1e9)
    o = {name: np.float32(value) for name, value in options.items()}
    rng = np.random.default_rng(0)
    name = "clip/visual/encoder/blocks/fc/kernel"
    weights, mean, square = half(rng.normal(0, 0.1, (1, 40, 40))), np.float32(0), np.float32(0)
    params = store_params(unflatten({name: weights}), "float16")
    optimizer = make_optimizer(OptimizerConfig(name="bert_adam", **options), 4)[1]
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    zeros = set()
    for step in range(3):
        gradient = 10 ** rng.uniform(-5, -2, (1, 40, 40)) * rng.choice([-1, 1], (1, 40, 40))
        gradient = np.float32(gradient)
        updates, state = update(unflatten({name: gradient}), state, params)
        params = optax.apply_updates(params, updates)
        g = half(gradient)
        mean = half(half(mean * o["b1"]) + (1 - o["b1"]) * g)
        square = half(half(square * o["b2"]) + (1 - o["b2"]) * g * g)
        direction = half(mean / half(half(np.sqrt(square)) + o["eps"]))
        rate = o["lr"] * np.float32(1e-3) * np.float32(0.5 * (1 + math.cos(math.pi * step / 4)))
        direction = half(direction + o["weight_decay"] * weights)
        weights = half(weights - half(rate * direction))
        found = flatten(params)[name]
        assert found.dtype == np.float16
        same = np.mean(np.float32(found) == weights)
        assert same > 0.998, same  # the rate itself is computed in another order
        zeros.add(float(np.mean(square == 0)))
    assert max(zeros) > 0.3  # second moments underflow


def test_adamw_is_not_for_float16():
    config = get_config()
    config.model.param_dtype = "float16"
    with pytest.raises(InputError, match=r"model.param_dtype = 'float16': must be float32 unless"):
        validate(config)


@pytest.mark.parametrize("name", ["adamw", "bert_adam"])
def test_lower_layers_learn_slower_with_layer_decay(name):
    params = jax.tree.map(lambda x: jnp.ones(x.shape), params_of("transformer", layers=3))
    gradients = jax.tree.map(jnp.ones_like, params)
    moved = []
    for decay in (1.0, 0.5):
        config = OptimizerConfig(name=name, weight_decay=0.0, warmup=0.0, layer_decay=decay)
        optimizer = make_optimizer(config, 4)[1]
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
        moved.append(slices(updates))
    expected = {}
    for part in moved[0]:
        tower, layer = part.startswith("clip/"), part.rpartition("/")[2]
        top = any(n in part for n in ("ln_final", "ln_post", "projection", "logit_scale"))
        power = 3 - int(layer) if layer.isdigit() else 4
        expected[part] = 0.5**power if tower and not top else 1.0
    assert set(expected.values()) == {1.0, 0.5, 0.25, 0.125, 0.0625}
    for part, factor in expected.items():
        np.testing.assert_allclose(moved[1][part], factor * moved[0][part], rtol=1e-5, err_msg=part)
