"""The temporal encoder: frame features that know of one another (Eq. 1; ablated in Table 8)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from xclip_jax.models.clip import Transformer

TEMPORAL_ENCODERS = ("none", "transformer", "lstm")


class TemporalTransformer(nn.Module):
    """V = TransEnc(Vbar + P) over V x F x D frames, mask V x F True = real (Eq. 1)."""

    layers: int
    heads: int
    positions: int
    activation: str = "quick_gelu"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, frames_VxFxD, mask_VxF):
        _, num_frames, dim = frames_VxFxD.shape
        init = nn.initializers.normal(0.3)
        positions = self.param("positions", init, (self.positions, dim))
        x = frames_VxFxD + positions[:num_frames].astype(self.dtype)
        encoder = Transformer(
            self.layers, self.heads, self.activation, self.dtype, self.remat, name="encoder"
        )
        return encoder(x, mask_VxF[:, None, None, :])


class TemporalLstm(nn.Module):
    """One LSTM layer over V x F x D frames, D cells; gates and both biases as PyTorch's nn.LSTM.

    Written here because flax's cell has one bias where PyTorch's checkpoints carry two.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, frames_VxFxD, mask_VxF):
        num_videos, _, dim = frames_VxFxD.shape
        init = _uniform(dim**-0.5)
        project = nn.Dense(
            4 * dim, dtype=self.dtype, kernel_init=init, bias_init=init, name="input"
        )
        kernel_Dx4D = self.param("hidden_kernel", init, (dim, 4 * dim)).astype(self.dtype)
        bias_4D = self.param("hidden_bias", init, (4 * dim,)).astype(self.dtype)

        def step(carry, gates_Vx4D):
            hidden, cell = carry
            gates_Vx4D = gates_Vx4D + hidden @ kernel_Dx4D + bias_4D
            entry, forget, candidate, output = jnp.split(gates_Vx4D, 4, -1)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(entry) * jnp.tanh(candidate)
            hidden = jax.nn.sigmoid(output) * jnp.tanh(cell)
            return (hidden, cell), hidden

        zeros = jnp.zeros((num_videos, dim), self.dtype)
        inputs_FxVx4D = jnp.swapaxes(project(frames_VxFxD), 0, 1)
        _, hidden_FxVxD = jax.lax.scan(step, (zeros, zeros), inputs_FxVx4D)
        # It runs forward: real frames come first and never see the padding, whose output is 0.
        return jnp.where(mask_VxF[..., None], jnp.swapaxes(hidden_FxVxD, 0, 1), 0)


def _uniform(bound):
    """U(-bound, bound), how PyTorch initialises an LSTM."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )
