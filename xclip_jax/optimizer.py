"""AdamW and the optimizer of the PyTorch release, built from optax transformations.

Parameters below `blocks` are stacked over layers, where PyTorch has one tensor per layer:
per-tensor operations apply per layer slice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_map_with_path
from jaxtyping import Array
from ml_collections import ConfigDict

from xclip_jax.config import OptimizerConfig

TENSOR_NORM = 1.0  # largest norm of a tensor's gradient with bert_adam, whatever clip_norm is


def make_optimizer(
    c: OptimizerConfig | ConfigDict, total_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns the learning rate schedule of new parameters and the optimizer.

    `bert_adam` is the optimizer of the PyTorch release, with its schedule, gradient clipping per
    tensor besides the global one, and no bias correction. `c` is config.optimizer, `total_steps`
    (at least 1) the length of the schedule.
    """
    if c.name == "adamw":
        schedule, mask = learning_rate_schedule(c.lr, total_steps, c.warmup), decay_mask
        direction = optax.clip_by_global_norm(c.clip_norm), optax.scale_by_adam(c.b1, c.b2, c.eps)
    else:
        schedule, mask = bert_schedule(c.lr, total_steps, c.warmup), non_bias_mask
        direction = (
            optax.stateless(lambda gradients, _: clip_global(gradients, c.clip_norm)),
            optax.stateless(lambda gradients, _: clip_tensors(gradients, TENSOR_NORM)),
            scale_by_uncorrected_adam(c.b1, c.b2, c.eps),
        )
    optimizer = optax.chain(
        *direction,
        optax.add_decayed_weights(c.weight_decay, mask=mask),
        optax.scale_by_learning_rate(schedule),
        optax.masked(optax.scale(c.encoder_lr / c.lr), encoder_mask),
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

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Moments]:
        mean = optax.tree.update_moment(updates, state.mean, b1, 1)
        square = optax.tree.update_moment(updates, state.square, b2, 2)
        direction = jax.tree.map(lambda m, s: m / (jnp.sqrt(s) + eps), mean, square)
        return direction, Moments(mean, square)

    return optax.GradientTransformation(init, update)


def trainable_mask(params: Any, layers: int) -> Any:
    """Returns the mask of the parameters trained with the release's freeze_layer_num = `layers`.

    Under `clip`, the blocks from index `layers` on, the last norms, the projections and the logit
    scale are trained. Everything outside `clip` is trained. The mask is a bool, or L x 1 x ... for
    arrays stacked over L blocks.
    """

    def mask(path: Any, x: Any) -> Any:
        names = _names(path)
        if names[0] == "clip" and "blocks" in names:
            return np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) >= layers
        trained = {"ln_final", "ln_post", "projection", "logit_scale"}
        return names[0] != "clip" or not trained.isdisjoint(names)

    return tree_map_with_path(mask, params)


def _names(path: Any) -> list[str]:
    return [entry.key for entry in path]


def non_bias_mask(params: Any) -> Any:
    """Returns the mask of the parameters that decay with bert_adam: all except biases.

    The release exempts names that contain `bias` or `LayerNorm`, but its norms are called `ln_*`.
    PyTorch updates no parameter without a gradient: where pairs are scored by a Transformer, the
    logit scale has none.
    """
    exempt = {"bias", "hidden_bias"} | ({"logit_scale"} if "pair_encoder" in params else set())
    return tree_map_with_path(lambda path, _: _names(path)[-1] not in exempt, params)


def _mask(is_in: Callable[[list[str]], bool]) -> Callable[[Any], Any]:
    """Returns a function from parameters to the mask of those whose names satisfy a condition."""
    return lambda params: tree_map_with_path(lambda path, _: is_in(_names(path)), params)


_NO_DECAY = ("bias", "scale", "hidden_bias", "logit_scale", "class_token")
decay_mask = _mask(lambda names: names[-1] not in _NO_DECAY)  # kernels and embeddings, for adamw
encoder_mask = _mask(lambda names: names[0] == "clip")
