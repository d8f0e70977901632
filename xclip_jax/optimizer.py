"""AdamW and the optimizer of the PyTorch release, built from optax transformations.

Parameters below `blocks` are stacked over layers, where PyTorch has one tensor per layer:
per-tensor operations apply per layer slice.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

OptimizerName = Literal["adamw", "bert_adam"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
TENSOR_NORM = 1.0  # largest norm of a tensor's gradient with bert_adam, whatever clip_norm is
Path = tuple[Any, ...]  # of a leaf, as jax.tree_util gives it


def make_optimizer(
    total_steps: int,
    *,
    name: OptimizerName,
    lr: float,
    encoder_lr: float | Array,
    weight_decay: float,
    warmup: float,
    b1: float,
    b2: float,
    eps: float,
    clip_norm: float,
    freeze_layers: int = -1,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns the learning rate schedule of new parameters and the optimizer of config.optimizer.

    Args:
        total_steps: length of the schedule.
        name: `adamw`, or `bert_adam`: the PyTorch release's optimizer, with its schedule, gradient
            clipping per tensor besides the global one, and no bias correction.
        lr: peak learning rate of new parameters.
        encoder_lr: peak learning rate of everything under `clip`.
        weight_decay: decoupled, multiplied by the rate; see `decay_mask` and `non_bias_mask`.
        warmup: fraction of `total_steps` with rising rate, 0 to below 1.
        b1, b2, eps: Adam's constants.
        clip_norm: largest global norm of the gradient.
        freeze_layers: CLIP's layers to freeze, see `trainable_mask`; below 0: none.
    """
    if name == "adamw":
        schedule = learning_rate_schedule(lr, total_steps, warmup)
        mask = decay_mask
        direction = optax.clip_by_global_norm(clip_norm), optax.scale_by_adam(b1, b2, eps)
    else:
        schedule = bert_schedule(lr, total_steps, warmup)
        mask = non_bias_mask
        clipping = clip_global(clip_norm), clip_tensors(TENSOR_NORM)
        direction = *clipping, scale_by_uncorrected_adam(b1, b2, eps)
    optimizer = optax.chain(
        *direction,
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.scale_by_learning_rate(schedule),
        optax.masked(optax.scale(encoder_lr / lr), encoder_mask),
    )
    if freeze_layers < 0:
        return schedule, optimizer
    # First, so that frozen gradients do not count in the global norm; last, against weight decay.
    freeze = zero_frozen(freeze_layers)
    return schedule, optax.chain(freeze, optimizer, freeze)


def learning_rate_schedule(peak: float, total_steps: int, warmup: float) -> optax.Schedule:
    """Returns a linear rise from 0 over a fraction `warmup` of the steps, then a cosine to 0.

    A `warmup` above 0 takes at least one step and leaves at least one to the cosine.
    """
    warmup_steps = max(1, round(warmup * total_steps)) if warmup else 0
    warmup_steps = min(warmup_steps, total_steps - 1)
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


def clip_global(max_norm: float) -> optax.GradientTransformation:
    """Clips all gradients together, as torch.nn.utils.clip_grad_norm_ does."""

    def clip(gradients: Any, params: Any) -> Any:
        del params
        norm = optax.tree.norm(gradients)
        return jax.tree.map(lambda x: _clip(x, norm, max_norm), gradients)

    return optax.stateless(clip)


def clip_tensors(max_norm: float) -> optax.GradientTransformation:
    """Clips the gradient of each PyTorch tensor by itself, with the formula of `clip_global`."""

    def clip(path: Path, x: Array) -> Array:
        axes = tuple(range(int(_is_stacked(path)), x.ndim))
        return _clip(x, jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)), max_norm)

    return optax.stateless(lambda gradients, _: jax.tree_util.tree_map_with_path(clip, gradients))


def _clip(x: Float[Array, "*S"], norm: Float[Array, "..."], max_norm: float) -> Float[Array, "*S"]:
    return x * jnp.minimum(1, max_norm / (norm + 1e-6))


class Moments(NamedTuple):
    """Running means of the gradient and of its square, each a tree like the parameters."""

    mean: optax.Updates
    square: optax.Updates


def scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Scales gradients to mean / (sqrt(square) + eps): Adam without optax's bias correction."""

    def init(params: Any) -> Moments:
        return Moments(optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Moments]:
        del params
        mean = optax.tree.update_moment(updates, state.mean, b1, 1)
        square = optax.tree.update_moment(updates, state.square, b2, 2)
        direction = jax.tree.map(lambda m, s: m / (jnp.sqrt(s) + eps), mean, square)
        return direction, Moments(mean, square)

    return optax.GradientTransformation(init, update)


def decay_mask(params: Any) -> Any:
    """Returns the mask of the parameters that decay with adamw: kernels and embeddings."""
    exempt = ("bias", "scale", "hidden_bias", "logit_scale", "class_token")
    return _map_names(lambda names: names[-1] not in exempt, params)


def non_bias_mask(params: Any) -> Any:
    """Returns the mask of the parameters that decay with bert_adam: all except biases.

    The release exempts names that contain `bias` or `LayerNorm`, but its norms are called `ln_*`.
    """
    return _map_names(lambda names: names[-1] not in ("bias", "hidden_bias"), params)


def encoder_mask(params: Any) -> Any:
    """Returns the mask of the parameters under `clip`."""
    return _map_names(lambda names: names[0] == "clip", params)


def zero_frozen(layers: int) -> optax.GradientTransformation:
    """Sets the updates of frozen parameters to 0, see `trainable_mask`."""

    def zero(updates: Any, params: Any) -> Any:
        del params
        masks = trainable_mask(updates, layers)
        return jax.tree.map(lambda x, mask: jnp.where(mask, x, 0), updates, masks)

    return optax.stateless(zero)


def trainable_mask(params: Any, layers: int) -> Any:
    """Returns the mask of the parameters trained with the release's freeze_layer_num = `layers`.

    Under `clip`, the blocks from index `layers` on, the last norms, the projections and the logit
    scale are trained. Everything outside `clip` is trained.

    Returns:
        A tree like `params`: bool, or L x 1 x ... for arrays stacked over L blocks.
    """

    def mask(path: Path, x: Any) -> Any:
        names = _names(path)
        if names[0] != "clip":
            return True
        if _is_stacked(path):
            return np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) >= layers
        return not {"ln_final", "ln_post", "projection", "logit_scale"}.isdisjoint(names)

    return jax.tree_util.tree_map_with_path(mask, params)


def _map_names(function: Callable[[list[str]], bool], params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: function(_names(path)), params)


def _names(path: Path) -> list[str]:
    return [entry.key for entry in path]


def _is_stacked(path: Path) -> bool:
    return "blocks" in _names(path)
