"""AdamW and the optimizer of the PyTorch release, built from optax transformations.

Parameters below `blocks` are stacked over layers, where PyTorch has one tensor per layer:
per-tensor operations apply per layer slice.

Gradients and updates are float32. Parameters and moments may be stored as float16, as CLIP's are in
the release: every result that PyTorch would store is then rounded to float16.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_map_with_path
from jaxtyping import Array
from ml_collections import ConfigDict

from xclip_jax.config import OptimizerConfig

# Parts of the towers above all blocks, or between those of a video tower.
TOP = {"ln_final", "ln_post", "ln_temporal", "pool", "projection", "logit_scale"}
STACKS = ("encoder", "temporal", "joint")  # of a tower's blocks, from the lowest
TENSOR_NORM = 1.0  # largest norm of a tensor's gradient with bert_adam, whatever clip_norm is


def make_optimizer(
    c: OptimizerConfig | ConfigDict, total_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns the learning rate schedule of new parameters and the optimizer.

    `bert_adam` is the optimizer of the PyTorch release, with its schedule, gradient clipping per
    tensor besides the global one, no bias correction, and the rounding of float16 parameters. `c`
    is config.optimizer, `total_steps` (at least 1) the length of the schedule.
    """
    if c.name == "adamw":
        schedule, mask = learning_rate_schedule(c.lr, total_steps, c.warmup), decay_mask
        direction = optax.clip_by_global_norm(c.clip_norm), optax.scale_by_adam(c.b1, c.b2, c.eps)
    else:
        schedule, mask = bert_schedule(c.lr, total_steps, c.warmup), non_bias_mask
        direction = (
            optax.stateless(lambda g, p: round_to(clip_global(round_to(g, p), c.clip_norm), p)),
            optax.stateless(lambda g, p: round_to(clip_tensors(g, TENSOR_NORM), p)),
            scale_by_uncorrected_adam(c.b1, c.b2, c.eps),
        )
    optimizer = optax.chain(
        *direction,
        rounded(optax.add_decayed_weights(c.weight_decay, mask=mask)),
        optax.scale_by_learning_rate(schedule),
        rounded(optax.masked(scale_encoders(c.encoder_lr / c.lr, c.layer_decay), encoder_mask)),
    )
    if c.freeze_layers >= 0:
        # First, so that frozen gradients do not count in the global norm; last, against decay.
        freeze = optax.stateless(lambda updates, _: trainable(updates, c))
        optimizer = optax.chain(freeze, optimizer, freeze)
    return schedule, optimizer


def trainable(updates: Any, c: OptimizerConfig | ConfigDict) -> Any:
    """Returns gradients or updates with zeros for frozen parameters."""
    if c.freeze_layers < 0:
        return updates
    masks = trainable_mask(updates, c.freeze_layers)
    return jax.tree.map(lambda x, mask: jnp.where(mask, x, 0), updates, masks)


def learning_rate_schedule(peak: float, total_steps: int, warmup: float) -> optax.Schedule:
    """Returns a linear rise from 0 over a fraction `warmup` of the steps, then a cosine to 0.

    A `warmup` above 0 takes at least one step and leaves at least one to the cosine.
    """
    warmup_steps = min(max(bool(warmup), round(warmup * total_steps)), total_steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps)


def bert_schedule(peak: float, total_steps: int, warmup: float) -> optax.Schedule:
    """Returns the release's schedule: a linear rise from 0, then the rest of a cosine.

    The cosine starts at step 0, so its first part is skipped. Without warmup it starts at the peak.
    """
    # In float64, as in the release: float32 can move the end of the warmup by one step.
    warmup_steps = int(np.sum(np.arange(total_steps) / total_steps < warmup))

    def schedule(step: Any) -> Array:
        x = step / total_steps
        falling = 0.5 * (1 + jnp.cos(jnp.pi * x))
        return peak * jnp.where(step < warmup_steps, x / (warmup or 1), falling)

    return schedule


def scale_encoders(ratio: float | Array, layer_decay: float) -> optax.GradientTransformation:
    """Scales the updates of CLIP's towers by `ratio`, and lower layers by `layer_decay` besides.

    Layer l of L (from 1) is scaled by layer_decay^(L + 1 - l), the embeddings as layer 0, and the
    parts in TOP as layer L + 1 (layer-wise learning rate decay, Clark et al., 2020,
    https://arxiv.org/abs/2003.10555, Sec. 3.1; Bao et al., 2022).
    """

    def scale(updates: Any, params: Any) -> Any:
        below = _count_below(params)

        def factor(path: Any, x: Array) -> Array:
            names = _names(path)
            if not TOP.isdisjoint(names):
                return x * ratio
            above = below[names[1], "top"] + 1
            if "blocks" in names:
                above -= below[names[1], names[2]] + 1
                above = above - np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1))
            return x * (ratio * layer_decay**above)

        return tree_map_with_path(factor, updates)

    return optax.stateless(scale) if layer_decay < 1 else optax.scale(ratio)


def _count_below(params: Any) -> dict[tuple[str, str], int]:
    """Returns the number of blocks below each stack of a tower, and below its "top"."""
    counts = {}
    for tower in ("visual", "textual"):
        total, parts = 0, params["clip"].get(tower, {})
        for stack in (name for name in STACKS if name in parts):
            counts[tower, stack] = total
            total += len(jax.tree.leaves(parts[stack]["blocks"])[0])
        counts[tower, "top"] = total
    return counts


def clip_global(gradients: Any, max_norm: float) -> Any:
    """Clips all gradients together, as torch.nn.utils.clip_grad_norm_ does."""
    return optax.tree.scale(_clip_factor(optax.tree.norm(gradients), max_norm), gradients)


def clip_tensors(gradients: Any, max_norm: float) -> Any:
    """Clips the gradient of each PyTorch tensor by itself, with the formula of `clip_global`."""

    def clip(path: Any, x: Array) -> Array:
        axes = tuple(range("blocks" in _names(path), x.ndim))
        return x * _clip_factor(jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)), max_norm)

    return tree_map_with_path(clip, gradients)


def _clip_factor(norm: Array, max_norm: float) -> Array:
    return jnp.minimum(1, max_norm / (norm + 1e-6))


class Moments(NamedTuple):
    """Running means of the gradient and of its square, each a tree like the parameters."""

    mean: optax.Updates
    square: optax.Updates


def scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Scales gradients to mean / (sqrt(square) + eps): Adam without optax's bias correction."""

    def init(params: Any) -> Moments:
        return Moments(optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def average(decay: float, moment: Array, x: Array) -> Array:
        decayed = round_to(decay * moment.astype(jnp.float32), moment)
        return round_to(decayed + (1 - decay) * x, moment)

    def divide(mean: Array, square: Array, like: Array) -> Array:
        return round_to(mean / round_to(round_to(jnp.sqrt(square), like) + eps, like), like)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Moments]:
        squares = jax.tree.map(jnp.square, updates)
        mean = jax.tree.map(functools.partial(average, b1), state.mean, updates)
        square = jax.tree.map(functools.partial(average, b2), state.square, squares)
        direction = jax.tree.map(divide, mean, square, state.mean)
        return direction, optax.tree.cast_like(Moments(mean, square), state)

    return optax.GradientTransformation(init, update)


def round_to(tree: Any, like: Any) -> Any:
    """Returns float32 arrays, rounded to the types of the arrays in `like`."""

    def round_array(x: Array, like: Array) -> Array:
        if x.dtype == like.dtype:
            return x
        # Without the barrier, XLA computes with the numbers before rounding.
        return jax.lax.optimization_barrier(x.astype(like.dtype)).astype(x.dtype)

    return jax.tree.map(round_array, tree, like)


def rounded(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Computes a transformation in float32, rounded to the types of the parameters."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        float32 = optax.tree.cast(params, jnp.float32)
        updates, state = transformation.update(updates, state, float32)
        return round_to(updates, params), state

    return optax.GradientTransformation(transformation.init, update)


def store_params(params: Any, dtype: Literal["float32", "float16"]) -> Any:
    """Returns float32 parameters with CLIP's matrices in `dtype`.

    These are the weights and biases that CLIP's `convert_weights` chooses: all except norms,
    embeddings, positions and the logit scale.
    """
    return jax.tree.map(
        lambda x, half: x.astype(dtype if half else x.dtype), params, _matrices(params)
    )


def trainable_mask(params: Any, layers: int) -> Any:
    """Returns the mask of the parameters trained with the release's freeze_layer_num = `layers`.

    Under `clip`, the blocks from index `layers` on, the last norms, the projections and the logit
    scale are trained. Everything outside `clip` is trained. The mask is a bool, or L x 1 x ... for
    arrays stacked over L blocks.
    """
    below = _count_below(params)

    def mask(path: Any, x: Any) -> Any:
        names = _names(path)
        if names[0] == "clip" and "blocks" in names:
            number = below[names[1], names[2]] + np.arange(len(x))
            return number.reshape(-1, *[1] * (x.ndim - 1)) >= layers
        return names[0] != "clip" or not TOP.isdisjoint(names)

    return tree_map_with_path(mask, params)


def _names(path: Any) -> list[str]:
    return [entry.key for entry in path]


def non_bias_mask(params: Any) -> Any:
    """Returns the mask of the parameters that decay with bert_adam: all except biases.

    The release exempts names that contain `bias` or `LayerNorm`, but its norms are called `ln_*`.
    PyTorch updates no parameter without a gradient: where pairs are scored by a Transformer, the
    logit scale has none.
    """
    exempt = {"bias", "hidden_bias", "log_tau", "logit_bias"} | (
        {"logit_scale"} if "pair_encoder" in params else set()
    )
    return tree_map_with_path(lambda path, _: _names(path)[-1] not in exempt, params)


def _mask(is_in: Callable[[list[str]], bool]) -> Callable[[Any], Any]:
    """Returns a function from parameters to the mask of those whose names satisfy a condition."""
    return lambda params: tree_map_with_path(lambda path, _: is_in(_names(path)), params)


_NO_DECAY = (
    "bias",
    "scale",
    "hidden_bias",
    "logit_scale",
    "class_token",
    "log_tau",
    "logit_bias",
    "probe",
)
decay_mask = _mask(lambda names: names[-1] not in _NO_DECAY)  # kernels and embeddings, for adamw
encoder_mask = _mask(lambda names: names[0] == "clip")
_matrices = _mask(
    lambda names: names[0] == "clip" and names[-1] in ("kernel", "bias") and "norm" not in names
)
