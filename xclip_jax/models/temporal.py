"""Temporal encoders, which relate the frames of a video (Eq. 1, ablated in Table 8)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xclip_jax.models.config import ModelConfig
from xclip_jax.models.transformer import Transformer, normal
from xclip_jax.similarity import AnyArray, FrameMask

Frames = Float[AnyArray, "V F D"]


class TemporalTransformer(nn.Module):
    """Transformer over the real frames of a video: V = TransEnc(Vbar + P) (Eq. 1)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, frames_VxFxD: Frames, mask_VxF: FrameMask) -> Frames:
        c, (_, num_frames, dim) = self.config, frames_VxFxD.shape
        # As many as CLIP's texts, from which they are initialised, or more.
        count = max(c.text.context_length, c.max_frames)
        positions = self.param("positions", normal(0.3), (count, dim))
        x = frames_VxFxD + positions[:num_frames].astype(c.compute_dtype)
        encoder = Transformer(c.blocks("temporal"), c.compute_dtype, c.remat, name="encoder")
        return encoder(x, jnp.asarray(mask_VxF)[:, None, None, :])


class TemporalLSTM(nn.Module):
    """One LSTM layer of D cells, with the gates and both biases of PyTorch's nn.LSTM.

    flax's own cell has one bias, but PyTorch checkpoints contain two. The output for padding is 0.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, frames_VxFxD: Frames, mask_VxF: FrameMask) -> Frames:
        num_videos, _, dim = frames_VxFxD.shape
        dtype, bound = self.config.compute_dtype, dim**-0.5

        def init(key: Array, shape: tuple[int, ...], dtype: Any = "float32") -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        project = nn.Dense(4 * dim, dtype=dtype, kernel_init=init, bias_init=init, name="input")
        kernel_Dx4D = self.param("hidden_kernel", init, (dim, 4 * dim)).astype(dtype)
        bias_4D = self.param("hidden_bias", init, (4 * dim,)).astype(dtype)

        def step(carry: tuple[Array, Array], gates_Vx4D: Array) -> tuple[tuple, Array]:
            hidden, cell = carry
            gates_Vx4D = gates_Vx4D + hidden @ kernel_Dx4D + bias_4D
            entry, forget, candidate, output = jnp.split(gates_Vx4D, 4, -1)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(entry) * jnp.tanh(candidate)
            hidden = jax.nn.sigmoid(output) * jnp.tanh(cell)
            return (hidden, cell), hidden

        zeros = jnp.zeros((num_videos, dim), dtype)
        inputs_FxVx4D = jnp.swapaxes(project(frames_VxFxD), 0, 1)
        _, hidden_FxVxD = jax.lax.scan(step, (zeros, zeros), inputs_FxVx4D)
        # Real frames come first, so padding cannot influence them.
        return jnp.where(mask_VxF[..., None], jnp.swapaxes(hidden_FxVxD, 0, 1), 0)
