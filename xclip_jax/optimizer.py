"""AdamW with two learning rates, warm-up and cosine decay, out of optax parts."""

import jax
import optax


def learning_rate_schedule(peak, total_steps, warmup):
    """Linear from 0 over the first `warmup` share of the steps, then a cosine to 0.

    A `warmup` above 0 takes at least one step, and always leaves one to the cosine; 0: none.
    """
    warmup_steps = max(1, round(warmup * total_steps)) if warmup else 0
    warmup_steps = min(warmup_steps, total_steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps)


def make_optimizer(schedule, encoder_ratio, weight_decay, b1=0.9, b2=0.98, eps=1e-6, clip_norm=1.0):
    """The gradient transformation.

    Args:
        schedule: step -> learning rate of what is new (temporal encoder).
        encoder_ratio: what the rate is multiplied by for everything under `clip`.
        weight_decay: decoupled, times the rate; on matrices only: no biases, norms or scalars.
        clip_norm: largest global norm of the gradient.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule),
        optax.masked(optax.scale(encoder_ratio), encoder_mask),
    )


def decayed(params):
    """True for the weights that decay: kernels and embeddings, not biases, norms and scalars."""

    def is_matrix(path, _):
        names = [entry.key for entry in path]
        return names[-1] not in ("bias", "scale", "hidden_bias", "logit_scale", "class_token")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def encoder_mask(params):
    """True for what came from CLIP: everything under `clip`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "clip", params)
