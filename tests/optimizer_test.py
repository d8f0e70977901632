"""Both optimizers by hand: two rates, what decays, schedules, clipping, freezing."""

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from xclip_jax.models.config import ModelConfig, TemporalConfig, TextConfig, VisionConfig
from xclip_jax.models.xclip import XClip
from xclip_jax.optimizer import (
    OPTIMIZERS,
    all_but_biases,
    bert_schedule,
    decayed,
    encoder_mask,
    learning_rate_schedule,
    make_optimizer,
    trained,
)


def params_of(temporal, layers=1):
    """The shapes of a small X-CLIP's parameters."""
    config = ModelConfig(
        vision=VisionConfig(image_size=4, patch_size=2, width=4, layers=layers, heads=1),
        text=TextConfig(vocab_size=5, context_length=4, width=4, layers=layers, heads=1),
        temporal=TemporalConfig(temporal, layers=1, heads=1),
        embed_dim=4,
    )
    model = XClip(config.resolve())
    ids, frames = np.ones((1, 4), np.int32), np.zeros((1, 2, 4, 4, 3), np.uint8)
    masks = np.ones((1, 4), bool), np.ones((1, 2), bool)
    inputs = ids, masks[0], frames, masks[1]
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def flatten(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat):
    """The tree of float32 arrays."""
    flat = {name: jnp.asarray(value, jnp.float32) for name, value in flat.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def chosen(mask):
    return {name for name, value in flatten(mask).items() if value}


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


@pytest.mark.parametrize("temporal", ["transformer", "lstm"])
def test_the_release_spares_biases_alone(temporal):
    """Its norms are called ln_*, not LayerNorm; an LSTM's biases bias_ih_l0 and bias_hh_l0."""
    params = params_of(temporal)
    spared = chosen(jax.tree.map(lambda x: not x, all_but_biases(params)))
    assert spared == {name for name in flatten(params) if name.endswith("bias")}
    assert ("temporal_encoder/hidden_bias" in spared) == (temporal == "lstm")
    always = ("logit_scale", "visual/class_token", "visual/ln_post/norm/scale", "textual/positions")
    assert {f"clip/{name}" for name in always} <= chosen(all_but_biases(params))


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
    options = ratio, decay, 0.4, b1, b2, eps, clip_norm
    schedule, optimizer = make_optimizer("adamw", 0.1, 5, *options)
    assert [float(schedule(step)) for step in (0, 1, 2)] == pytest.approx([0, 0.05, 0.1])
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


# What is left of 0.5 * (1 + cos(pi x)) at x = 0.1, 0.2, ...
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
def test_the_release_joins_a_cosine_under_way(total, warmup, expected):
    """Hand-computed; the same for a number as for an array inside a jitted update."""
    schedule = bert_schedule(2.0, total, warmup)
    found = [float(schedule(step)) for step in range(len(expected))]
    assert found == pytest.approx([2 * rate for rate in expected], abs=2e-6)
    jitted = [float(jax.jit(schedule)(jnp.int32(step))) for step in range(len(expected))]
    assert jitted == pytest.approx(found, abs=1e-6)


# A tree with all that is special, and the names that PyTorch gives it: a tensor for each layer.
SHAPES = {
    "clip/logit_scale": (),
    "clip/visual/class_token": (3,),
    "clip/visual/encoder/blocks/attention/qkv/kernel": (2, 4, 3, 2, 2),
    "clip/visual/encoder/blocks/attention/qkv/bias": (2, 3, 2, 2),
    "clip/visual/encoder/blocks/ln_1/norm/scale": (2, 3),
    "temporal_encoder/encoder/blocks/fc/kernel": (3, 3, 2),
    "temporal_encoder/encoder/blocks/fc/bias": (3, 2),
    "temporal_encoder/positions": (4, 3),
    "temporal_encoder/input/bias": (5,),
    "temporal_encoder/hidden_bias": (5,),
}
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


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return unflatten({name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()})


def to_torch(tree):
    """Dict of PyTorch's names -> its tensors."""
    tensors = {}
    for name, value in flatten(tree).items():
        torch_name = TORCH_NAMES[name]
        if "{}" in torch_name:
            tensors |= {torch_name.format(layer): part for layer, part in enumerate(value)}
        else:
            tensors[torch_name] = value
    return tensors


class BertAdam:
    """The release's optimizer in float64, a tensor at a time; `clipped`: which clipping bit."""

    def __init__(self, tensors, total, ratio, decay, warmup, b1, b2, eps, clip_norm):
        self.values = {name: np.float64(value) for name, value in tensors.items()}
        self.mean = {name: np.zeros_like(value) for name, value in self.values.items()}
        self.square = {name: np.zeros_like(value) for name, value in self.values.items()}
        self.total, self.ratio, self.decay, self.warmup = total, ratio, decay, warmup
        self.b1, self.b2, self.eps, self.clip_norm = b1, b2, eps, clip_norm
        self.steps, self.clipped = 0, set()

    def clip(self, what, gradients, max_norm):
        norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients))
        factor = max_norm / (norm + 1e-6)
        self.clipped |= {what} if factor < 1 else set()
        return [gradient * min(1, factor) for gradient in gradients]

    def step(self, gradients, lr):
        gradients = [np.float64(gradients[name]) for name in self.values]
        gradients = self.clip("all", gradients, self.clip_norm)
        x = self.steps / self.total
        lr *= x / self.warmup if x < self.warmup else 0.5 * (1 + math.cos(math.pi * x))
        for name, gradient in zip(self.values, gradients, strict=True):
            [gradient] = self.clip("tensors", [gradient], 1.0)
            self.mean[name] = self.b1 * self.mean[name] + (1 - self.b1) * gradient
            self.square[name] = self.b2 * self.square[name] + (1 - self.b2) * gradient**2
            update = self.mean[name] / (np.sqrt(self.square[name]) + self.eps)
            if not ("bias" in name or "LayerNorm" in name):
                update = update + self.decay * self.values[name]
            rate = lr * (self.ratio if name.startswith("clip.") else 1)
            self.values[name] = self.values[name] - rate * update
        self.steps += 1


@pytest.mark.parametrize(
    ("clip_norm", "sizes", "clipped"),
    [
        # Epsilon counts with tiny gradients. At 1.0 the global clipping leaves the second nothing.
        (1.0, (1e-6, 1e-5, 1e-6, 3e-6, 1e-6), set()),
        (1.0, (0.5, 100.0, 0.01, 1e-6, 0.1), {"all"}),
        (1e9, (0.3, 100.0, 0.3, 0.01, 30.0), {"tensors"}),
        (6.0, (0.3, 100.0, 0.3, 0.01, 30.0), {"all", "tensors"}),
    ],
)
def test_updates_equal_bert_adam_by_hand(clip_norm, sizes, clipped):
    params = random_tree(0)
    options = 0.05, 0.2, 0.3, 0.9, 0.98, 1e-6, clip_norm
    reference = BertAdam(to_torch(params), 5, *options)
    schedule, optimizer = make_optimizer("bert_adam", 0.1, 5, *options)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    before = params
    for step, size in enumerate(sizes):
        gradients = random_tree(step + 1, size)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        reference.step(to_torch(gradients), 0.1)
        for name, value in to_torch(params).items():
            np.testing.assert_allclose(value, reference.values[name], atol=2e-6, err_msg=name)
        if step == 0:
            assert jax.tree.all(jax.tree.map(np.array_equal, params, before))
    assert reference.clipped == clipped
    assert float(schedule(0)) == 0


def frozen_names(layers):
    """PyTorch's rule: neither a block from number `layers` on, nor one of the last parameters."""
    embeddings = {"textual/tokens/embedding", "textual/positions", "visual/positions"}
    embeddings |= {"visual/class_token", "visual/patch/kernel"}
    embeddings |= {f"visual/ln_pre/norm/{name}" for name in ("scale", "bias")}
    blocks = {
        f"{tower}/encoder/blocks/{name}/{layer}"
        for tower in ("visual", "textual")
        for layer in range(layers)
        for name in (
            *(f"{part}/{end}" for part in ("fc", "proj") for end in ("kernel", "bias")),
            *(f"attention/{part}/{end}" for part in ("qkv", "out") for end in ("kernel", "bias")),
            *(f"{part}/norm/{end}" for part in ("ln_1", "ln_2") for end in ("scale", "bias")),
        )
    }
    return {f"clip/{name}" for name in embeddings | blocks}


def slices(tree):
    """Flat, with what is stacked taken apart."""
    flat = {}
    for name, value in flatten(tree).items():
        if "/blocks/" in name:
            flat |= {f"{name}/{layer}": part for layer, part in enumerate(value)}
        else:
            flat[name] = value
    return flat


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 9])
def test_what_is_frozen_is_as_in_the_release(layers):
    params = params_of("transformer", layers=3)
    masks = trained(params, layers)
    whole = jax.tree.map(lambda mask, x: np.broadcast_to(mask, x.shape), masks, params)
    frozen = {name for name, mask in slices(whole).items() if not mask.any()}
    assert frozen == frozen_names(min(layers, 3))
    assert all(mask.all() for name, mask in slices(whole).items() if name not in frozen)


def trained_for(steps, params, gradients, *options):
    """(updated parameters, state of the optimizer)."""
    optimizer = make_optimizer(*options)[1]
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# lr, total_steps, encoder_ratio, weight_decay, warmup, b1, b2, eps, clip_norm
OPTIONS = (1e-2, 8, 0.5, 0.2, 0.25, 0.9, 0.98, 1e-6, 1.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layers", [-1, 0, 1, 2])
def test_frozen_parameters_stay_as_they_are(name, layers):
    before = random_tree(0)
    after, _ = trained_for(3, before, random_tree(1), name, *OPTIONS, layers)
    before, after = slices(before), slices(after)
    same = {n for n in before if np.asarray(before[n]).tobytes() == np.asarray(after[n]).tobytes()}
    assert same == (set() if layers < 0 else frozen_names(layers) & set(before))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_gradients_do_not_count(name):
    """However large or broken, they are as absent as in PyTorch: not in the global norm either."""
    params, masks = random_tree(0), trained(random_tree(0), 1)

    def with_frozen(value):
        return jax.tree.map(lambda x, mask: jnp.where(mask, x, value), random_tree(1, 1e-2), masks)

    expected = trained_for(3, params, with_frozen(0), name, *OPTIONS, 1)
    for value in (1e3, np.nan):
        found = trained_for(3, params, with_frozen(value), name, *OPTIONS, 1)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    # What is trained is updated as without freezing, where frozen gradients are 0.
    unfrozen, _ = trained_for(3, params, with_frozen(0), name, *OPTIONS)
    found, unfrozen = slices(expected[0]), slices(unfrozen)
    for part in found.keys() - frozen_names(1):
        np.testing.assert_allclose(found[part], unfrozen[part], rtol=1e-6, err_msg=part)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layers", [-1, 0])
def test_states_can_be_saved(name, layers, tmp_path):
    _, state = trained_for(2, random_tree(0), random_tree(1), name, *OPTIONS, layers)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"^optimizer 'adam': must be one of adamw, bert_adam$"):
        make_optimizer("adam", *OPTIONS)
