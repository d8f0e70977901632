"""The contrastive loss of X-CLIP (https://arxiv.org/abs/2207.07285, Eq. 15-17)."""

import jax.numpy as jnp
import optax


def contrastive_loss(sim_TxV, video_B=None, scale=1.0):
    """Symmetric InfoNCE over a batch of matching pairs: scale x (L_v2t + L_t2v), Eq. 17.

    Args:
        sim_TxV: B x B logits; text i belongs to video i.
        video_B: optional int[B] naming each pair's video. Two captions of one video are then left
            out of each other's denominator; without it they count as negatives, as in the paper.
        scale: 1 as in the paper; the PyTorch release has 0.5.

    Returns:
        The scalar loss.
    """
    targets = jnp.arange(len(sim_TxV))
    if video_B is not None:
        same = (video_B[:, None] == video_B[None]) & ~jnp.eye(len(video_B), dtype=bool)
        sim_TxV = jnp.where(same, -1e9, sim_TxV)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    video_to_text = cross_entropy(sim_TxV.T, targets).mean()  # Eq. 15
    text_to_video = cross_entropy(sim_TxV, targets).mean()  # Eq. 16
    return scale * (video_to_text + text_to_video)
