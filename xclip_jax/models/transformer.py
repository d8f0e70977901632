"""The pre-norm Transformer of all towers, temporal encoders and heads.

Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, with the options of later encoders.
Parameters are float32, those of all layers stacked along a leading axis.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xclip_jax.devices import is_recent_gpu
from xclip_jax.models.config import BlockConfig
from xclip_jax.models.dense import dot_general
from xclip_jax.similarity import AnyArray

Tokens = Float[AnyArray, "B L E"]
Outputs = Float[AnyArray, "B M E"]  # M = L, or 1 with `first_only`
Mask = Bool[AnyArray, "#B #N _ _"]  # of attention, from position to position, True = attends
Angles = Float[AnyArray, "L H"]  # of rotary positions, for the H pairs of a head's values
# What the backward pass keeps of a layer: nothing, or the results of its matrix products.
REMAT = {
    "layers": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Layers of a transformer that is compiled without a loop: half the time of the demo's gradients on
# CPU. Deeper ones would take long to compile.
MAX_UNROLLED = 4
# The same for training steps of large models on CPU, where 13 s more of compilation save 6 % of the
# step of B/32.
MAX_UNROLLED_ON_CPU = 12
# Parameter values of a stack that are copied so that its last layer is apart from the loop: 1 GiB.
MAX_COPIED = 2**28
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}

MAX_SCORES = 2**26  # attention scores in memory at once where their logits are capped: 256 MiB

normal = nn.initializers.normal


class LayerNorm(nn.Module):
    """Layer normalisation computed in float32, returned in the type of its input."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*B E"]) -> Float[Array, "*B E"]:
        norm = nn.LayerNorm(epsilon=self.epsilon, dtype=jnp.float32, name="norm")
        return norm(x).astype(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention to the positions whose mask is True.

    With `first_only`, the output is that of the first position.
    """

    config: BlockConfig
    dtype: str
    first_only: bool = False

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask | None, angles: Angles | None = None) -> Outputs:
        c, width = self.config, x.shape[-1]
        shape, init = (3, c.heads, width // c.heads), normal(width**-0.5)
        options: Any = {"dtype": self.dtype, "dot_general": dot_general}
        qkv = nn.DenseGeneral(shape, kernel_init=init, name="qkv", **options)(x)
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        if self.first_only:
            query, mask = query[:, :1], None if mask is None else mask[:, :, :1]
        if c.logit_cap:
            y = capped_attention(query, key, value, mask, c.logit_cap)
        elif not self.first_only and uses_flash_attention(query, mask):
            y = flash_attention(query, key, value)
        else:
            y = jax.nn.dot_product_attention(query, key, value, mask=mask)
        if c.inner_norms:
            y = LayerNorm(c.epsilon, name="ln")(y.reshape(*y.shape[:2], -1)).reshape(y.shape)
        init = normal(width**-0.5 * _residual_scale(c))
        return nn.DenseGeneral(width, (-2, -1), kernel_init=init, name="out", **options)(y)


def uses_flash_attention(query: Float[Array, "B L N K"], mask: Mask | None) -> bool:
    """Returns True if cuDNN's kernel computes this attention: on a GPU, in 16 bits, without a mask.

    With a mask it would store L x L values, as many as the scores. It takes heads of at most 128
    values, in multiples of 8.
    """
    has_16_bits = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = query.shape[-1] <= 128 and query.shape[-1] % 8 == 0
    return has_16_bits and fits and mask is None and is_recent_gpu()


def flash_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B L N K"],
    value: Float[Array, "B L N K"],
    kernel: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "B L N K"]:
    """Returns attention without a mask by a kernel that stores no L x L scores.

    FlashAttention: Dao et al., 2022, https://arxiv.org/abs/2205.14135. cuDNN computes gradients of
    an even L only: an odd one is padded, and the last key is left out.
    """
    batch, length = query.shape[:2]
    options: Any = {"implementation": kernel}
    if length % 2:
        pad = ((0, 0), (0, 1), (0, 0), (0, 0))
        query, key, value = (jnp.pad(x, pad) for x in (query, key, value))
        options["key_value_seq_lengths"] = jnp.full(batch, length)
        options["query_seq_lengths"] = options["key_value_seq_lengths"]
    return jax.nn.dot_product_attention(query, key, value, **options)[:, :length]


def capped_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B M N K"],
    value: Float[Array, "B M N K"],
    mask: Mask | None,
    cap: float,
) -> Float[Array, "B L N K"]:
    """Returns attention with the logits cap * tanh(q k / sqrt(K) / cap).

    Queries are processed in blocks of at most MAX_SCORES scores, which the backward pass computes
    again.
    """
    (batch, length, heads, width), keys = query.shape, key.shape[1]

    def attend(query_BxNxK: Array, mask: Array | None) -> Array:
        options: Any = {"preferred_element_type": jnp.float32}
        scores_BxNxM = jnp.einsum("bnk,bmnk->bnm", query_BxNxK, key, **options)
        scores_BxNxM = cap * jnp.tanh(scores_BxNxM * (width**-0.5 / cap))
        if mask is not None:
            scores_BxNxM = jnp.where(mask, scores_BxNxM, -1e30)
        weights_BxNxM = jax.nn.softmax(scores_BxNxM).astype(value.dtype)
        return jnp.einsum("bnm,bmnk->bnk", weights_BxNxM, value)

    if mask is not None:  # one row for each query
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, keys))
    if (size := max(1, MAX_SCORES // (batch * heads * keys))) >= length:
        return jax.vmap(attend, (1, None if mask is None else 2), 1)(query, mask)
    rows = jnp.moveaxis(query, 1, 0), None if mask is None else jnp.moveaxis(mask, 2, 0)
    attend = jax.checkpoint(attend)
    return jnp.moveaxis(jax.lax.map(lambda row: attend(*row), rows, batch_size=size), 0, 1)


class Block(nn.Module):
    """Pre-norm transformer block in the form of a scan's body: (x, ...) -> (x, None).

    With `first_only`, the output is that of the first position.
    """

    config: BlockConfig
    dtype: str
    first_only: bool = False

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask | None, angles: Angles | None) -> tuple[Outputs, None]:
        c = self.config
        attention = SelfAttention(c, self.dtype, self.first_only, name="attention")
        y = attention(LayerNorm(c.epsilon, name="ln_1")(x), mask, angles)
        x = (x[:, :1] if self.first_only else x) + y
        y = LayerNorm(c.epsilon, name="ln_2")(x)
        return x + apply_mlp(c, self.dtype, y, _residual_scale(c)), None


def apply_mlp(
    c: BlockConfig, dtype: str, x: Float[AnyArray, "*B E"], scale: float = 1.0
) -> Float[Array, "*B E"]:
    """Applies the MLP of a block, as layers of the module that calls it.

    `scale` is a factor of the initial output weights.
    """
    width, hidden = x.shape[-1], c.mlp_width or 4 * x.shape[-1]
    options: Any = {"dtype": dtype, "dot_general": dot_general}
    options["kernel_init"] = normal((2 * width) ** -0.5)
    y, activate = nn.Dense(hidden, name="fc", **options)(x), ACTIVATIONS[c.activation or ""]
    # Gated linear units: Shazeer, 2020, https://arxiv.org/abs/2002.05202.
    y = activate(nn.Dense(hidden, name="gate", **options)(x)) * y if c.gated else activate(y)
    if c.inner_norms:
        y = LayerNorm(c.epsilon, name="ln_inner")(y)
    options["kernel_init"] = normal(width**-0.5 * scale)
    return nn.Dense(width, name="proj", **options)(y)


def _residual_scale(c: BlockConfig) -> float:
    """Returns the factor that keeps the initial scale of the residual stream, as in CLIP."""
    return (2 * c.layers) ** -0.5


class Transformer(nn.Module):
    """Stacked blocks. Without a key of REMAT as `remat`, nothing is recomputed.

    "none" marks a training step, which is unrolled further on CPU, "auto" any other program. With
    `first_only`, the output is that of the first position, B x 1 x E: the last block computes
    queries, keys and values of all positions, the rest for the first only, except in a loop over
    more than MAX_COPIED parameters. This saves 6 % of the tower of B/32. Raises ValueError if the
    parameters are those of another number of layers.
    """

    config: BlockConfig
    dtype: str = "float32"
    remat: str = "none"
    first_only: bool = False

    @nn.compact
    def __call__(
        self, x: Tokens, mask: Mask | None = None, angles: Angles | None = None
    ) -> Outputs:
        x, count = jnp.asarray(x), self.config.layers
        if self.is_initializing():
            axes: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            axes["in_axes"] = nn.broadcast
            blocks = nn.scan(Block, length=count, **axes)
            blocks(self.config, self.dtype, name="blocks")(x, mask, angles)
        params = self.variables["params"]["blocks"]
        if (found := len(jax.tree.leaves(params)[0])) != count:
            raise ValueError(f"parameters of {found} layers, expected {count}")
        splits = self.first_only and sum(p.size for p in jax.tree.leaves(params)) <= MAX_COPIED
        looped = 0 if count <= self._max_unrolled() else count - int(splits)
        stacked, rest = _split(params, looped)
        if looped:
            layer = self._make_layer(mask, angles, in_loop=True)
            x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, stacked)
        for i, params in enumerate(rest):
            is_last = i == len(rest) - 1
            layer = self._make_layer(mask, angles, first_only=self.first_only and is_last)
            x = layer(x, params)
        return x[:, :1] if self.first_only else x

    def _make_layer(
        self,
        mask: Mask | None,
        angles: Angles | None,
        *,
        first_only: bool = False,
        in_loop: bool = False,
    ) -> Callable[[Array, Any], Array]:
        """Returns the function of x and parameters of one layer."""
        block = Block(self.config, self.dtype, first_only, parent=None)

        def layer(x: Array, params: Any) -> Array:
            return block.apply({"params": params}, x, mask, angles)[0]

        if self.remat not in REMAT:
            return layer
        return jax.checkpoint(layer, prevent_cse=not in_loop, policy=REMAT[self.remat])

    def _max_unrolled(self) -> int:
        trains_on_cpu = self.remat == "none" and jax.default_backend() == "cpu"
        return MAX_UNROLLED_ON_CPU if trains_on_cpu else MAX_UNROLLED


def _split(stacked: Any, index: int) -> tuple[Any, list[Any]]:
    """Returns the parameters of the layers before `index`, stacked, and of each later layer."""
    leaves, structure = jax.tree.flatten(stacked)
    first, rest = zip(*(jnp.split(x, [index]) for x in leaves), strict=True)
    layers = zip(*map(jnp.unstack, rest), strict=True)
    return structure.unflatten(first), [structure.unflatten(layer) for layer in layers]


def rotate(x: Float[Array, "B L N K"], angles_LxH: Angles) -> Float[Array, "B L N K"]:
    """Rotates pairs of adjacent values, K = 2 H, by the angles of their positions.

    Rotary position embedding: Su et al., 2021, https://arxiv.org/abs/2104.09864, Eq. 34.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second, angles = pairs[..., 0], pairs[..., 1], jnp.asarray(angles_LxH)[:, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.reshape(x.shape).astype(x.dtype)
