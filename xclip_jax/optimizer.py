"""AdamW, or the optimizer of the PyTorch release: two learning rates, decay, clipping, freezing.

Out of optax parts, and what optax lacks for the second. Parameters below `blocks` are stacked over
layers, where PyTorch has a tensor for each: what concerns a tensor concerns a slice of theirs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

OPTIMIZERS = ("adamw", "bert_adam")
TENSOR_NORM = 1.0  # largest norm of a tensor's gradient with bert_adam, whatever clip_norm is


def make_optimizer(
    name,
    lr,
    total_steps,
    encoder_ratio,
    weight_decay,
    warmup,
    b1,
    b2,
    eps,
    clip_norm,
    freeze_layers=-1,
):
    """An optimizer and its learning rate.

    Args:
        name: `adamw`, or `bert_adam`: that of the PyTorch release, with its schedule, its clipping
            of each tensor besides the global one, and no bias correction.
        lr: peak learning rate of what is new.
        encoder_ratio: what the rate is multiplied by for everything under `clip`.
        weight_decay: decoupled, times the rate; see `decayed` and `all_but_biases` for on what.
        warmup: share of `total_steps` with rising rate, 0 to below 1.
        clip_norm: largest global norm of the gradient.
        freeze_layers: trains all below 0; from 0 see `trained`.

    Returns:
        (schedule, optimizer): step -> learning rate of what is new; optax.GradientTransformation.

    Raises:
        ValueError: there is no optimizer of that name.
    """
    if name == "adamw":
        schedule = learning_rate_schedule(lr, total_steps, warmup)
        mask = decayed
        direction = optax.clip_by_global_norm(clip_norm), optax.scale_by_adam(b1, b2, eps)
    elif name == "bert_adam":
        schedule = bert_schedule(lr, total_steps, warmup)
        mask = all_but_biases
        clipping = clip_global(clip_norm), clip_tensors(TENSOR_NORM)
        direction = *clipping, scale_by_uncorrected_adam(b1, b2, eps)
    else:
        raise ValueError(f"optimizer {name!r}: must be one of {', '.join(OPTIMIZERS)}")
    optimizer = optax.chain(
        *direction,
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.scale_by_learning_rate(schedule),
        optax.masked(optax.scale(encoder_ratio), encoder_mask),
    )
    if freeze_layers < 0:
        return schedule, optimizer
    # Before, or frozen gradients would count in the global norm; after, or frozen weights decayed.
    frozen = zero_frozen(freeze_layers)
    return schedule, optax.chain(frozen, optimizer, frozen)


def learning_rate_schedule(peak, total_steps, warmup):
    """Linear from 0 over the first `warmup` share of the steps, then a cosine to 0.

    A `warmup` above 0 takes at least one step, and always leaves one to the cosine; 0: none.
    """
    warmup_steps = max(1, round(warmup * total_steps)) if warmup else 0
    warmup_steps = min(warmup_steps, total_steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps)


def bert_schedule(peak, total_steps, warmup):
    """The release's: linear from 0 to near the peak, then the cosine that began with step 0.

    So it skips the cosine's first `warmup` share, and starts at the peak where that is 0.
    """
    # Counted in float64, as the release compares: float32 may put the border a step off.
    warmup_steps = int(np.sum(np.arange(total_steps) / total_steps < warmup))

    def schedule(step):
        x = step / total_steps
        falling = 0.5 * (1 + jnp.cos(jnp.pi * x))
        return peak * jnp.where(step < warmup_steps, x / (warmup or 1), falling)

    return schedule


def clip_global(max_norm):
    """Clips all gradients together, as torch.nn.utils.clip_grad_norm_ does."""

    def clip(gradients, _):
        norm = optax.tree.norm(gradients)
        return jax.tree.map(lambda x: _clipped(x, norm, max_norm), gradients)

    return optax.stateless(clip)


def clip_tensors(max_norm):
    """Clips each PyTorch tensor's gradient by itself, by the same formula."""

    def clip(path, x):
        axes = tuple(range(int(_is_stacked(path)), x.ndim))
        return _clipped(x, jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)), max_norm)

    return optax.stateless(lambda gradients, _: jax.tree_util.tree_map_with_path(clip, gradients))


def _clipped(x, norm, max_norm):
    return x * jnp.minimum(1, max_norm / (norm + 1e-6))


class Moments(NamedTuple):
    """Running means of the gradient and of its square, each a tree like the parameters."""

    mean: optax.Updates
    square: optax.Updates


def scale_by_uncorrected_adam(b1, b2, eps):
    """Mean / (sqrt(square) + eps): Adam without bias correction, which optax's always has."""

    def init(params):
        return Moments(optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(gradients, moments, _=None):
        mean = optax.tree.update_moment(gradients, moments.mean, b1, 1)
        square = optax.tree.update_moment(gradients, moments.square, b2, 2)
        direction = jax.tree.map(lambda m, s: m / (jnp.sqrt(s) + eps), mean, square)
        return direction, Moments(mean, square)

    return optax.GradientTransformation(init, update)


def decayed(params):
    """True for what decays with adamw: kernels and embeddings, not biases, norms and scalars."""
    kept = ("bias", "scale", "hidden_bias", "logit_scale", "class_token")
    return _map_names(lambda names: names[-1] not in kept, params)


def all_but_biases(params):
    """True for what decays with bert_adam.

    The release spares the names with `bias` or `LayerNorm` in them; its norms are called `ln_*`.
    """
    return _map_names(lambda names: names[-1] not in ("bias", "hidden_bias"), params)


def encoder_mask(params):
    """True for what came from CLIP: everything under `clip`."""
    return _map_names(lambda names: names[0] == "clip", params)


def zero_frozen(layers):
    """Zeroes what `trained` says is frozen."""

    def zero(updates, _):
        masks = trained(updates, layers)
        return jax.tree.map(lambda x, mask: jnp.where(mask, x, 0), updates, masks)

    return optax.stateless(zero)


def trained(params, layers):
    """The release's freeze_layer_num: what is trained where CLIP is partly frozen.

    Of what is under `clip` the blocks from index `layers` on, the last norms, the projections and
    the logit scale; all that is not under it.

    Returns:
        A tree like `params`: bool, or L x 1 x ... for what is stacked over L blocks.
    """

    def mask(path, x):
        names = _names(path)
        if names[0] != "clip":
            return True
        if _is_stacked(path):
            return np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) >= layers
        return not {"ln_final", "ln_post", "projection", "logit_scale"}.isdisjoint(names)

    return jax.tree_util.tree_map_with_path(mask, params)


def _map_names(function, params):
    return jax.tree_util.tree_map_with_path(lambda path, _: function(_names(path)), params)


def _names(path):
    return [entry.key for entry in path]


def _is_stacked(path):
    return "blocks" in _names(path)
