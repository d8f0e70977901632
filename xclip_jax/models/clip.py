"""CLIP's two towers (Radford et al., 2021, https://arxiv.org/abs/2103.00020).

Architecture and parameter shapes follow https://github.com/openai/CLIP. Layers are stacked along a
leading axis and scanned. Parameters are float32.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xclip_jax.models.config import ModelConfig, PreprocessConfig
from xclip_jax.similarity import AnyArray, FrameMask

Ids = Int[AnyArray, "T W"]
Tokens = Float[AnyArray, "B L E"]
Mask = Bool[AnyArray, "#B #N #L #L"]  # of attention, from position to position, True = attends
# What the backward pass keeps of a layer: nothing, or the results of its matrix products.
REMAT = {
    "layers": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Layers of a transformer that is compiled without a loop: half the time of the demo's gradients on
# CPU. Deeper ones would take long to compile.
MAX_UNROLLED = 4
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

normal = nn.initializers.normal


class LayerNorm(nn.Module):
    """Layer normalisation computed in float32, returned in the type of its input."""

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*B E"]) -> Float[Array, "*B E"]:
        return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name="norm")(x).astype(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention to the positions whose mask is True."""

    heads: int
    dtype: str
    output_scale: float  # factor of the initial output weights

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask | None) -> Tokens:
        width, init = x.shape[-1], normal(x.shape[-1] ** -0.5)
        shape = 3, self.heads, width // self.heads
        qkv = nn.DenseGeneral(shape, dtype=self.dtype, kernel_init=init, name="qkv")(x)
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        y = jax.nn.dot_product_attention(query, key, value, mask=mask)
        init = normal(width**-0.5 * self.output_scale)
        return nn.DenseGeneral(width, (-2, -1), dtype=self.dtype, kernel_init=init, name="out")(y)


class Block(nn.Module):
    """Pre-norm transformer block in the form of a scan's body: (x, mask) -> (x, None)."""

    config: ModelConfig
    layers: int  # number of layers of the whole transformer
    heads: int

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask | None) -> tuple[Tokens, None]:
        c, width = self.config, x.shape[-1]
        depth = (2 * self.layers) ** -0.5  # keeps the scale of the residual stream, as in CLIP
        attention = SelfAttention(self.heads, c.dtype, depth, name="attention")
        init = normal((2 * width) ** -0.5)
        expand = nn.Dense(4 * width, dtype=c.dtype, kernel_init=init, name="fc")
        init = normal(width**-0.5 * depth)
        project = nn.Dense(width, dtype=c.dtype, kernel_init=init, name="proj")
        x = x + attention(LayerNorm(name="ln_1")(x), mask)
        y = ACTIVATIONS[c.activation](expand(LayerNorm(name="ln_2")(x)))
        return x + project(y), None


class Transformer(nn.Module):
    """`layers` scanned blocks, with activation, compute type and recomputation from `config`."""

    config: ModelConfig
    layers: int
    heads: int

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        block = Block
        if self.config.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.config.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.layers,
            unroll=self.layers if self.layers <= MAX_UNROLLED else 1,
        )
        scanned = blocks(self.config, self.layers, self.heads, name="blocks")
        return scanned(jnp.asarray(x), mask)[0]


def normalize_frames(
    frames_VxFxSxSx3: AnyArray, mask_VxF: FrameMask, preprocess: PreprocessConfig
) -> Float[Array, "V F S S 3"]:
    """Normalises uint8 RGB (float is taken as normalised) and zeroes masked frames."""
    frames = frames_VxFxSxSx3
    if frames.dtype == jnp.uint8:
        mean, std = jnp.array(preprocess.mean), jnp.array(preprocess.std)
        frames = (frames.astype(jnp.float32) / 255 - mean) / std
    return jnp.where(mask_VxF[..., None, None, None], frames, 0)


class PatchEmbedding(nn.Module):
    """Linear map of square patches, row by row.

    Equals a convolution with stride = size; as a matrix product it is several times as fast on CPU,
    forward and backward.
    """

    size: int
    width: int

    @nn.compact
    def __call__(self, images_BxSxSx3: Float[Array, "B S S 3"]) -> Float[Array, "B L E"]:
        number, side = images_BxSxSx3.shape[:2]
        grid, size = side // self.size, self.size
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        kernel = self.param("kernel", init, (size, size, 3, self.width))
        patches = images_BxSxSx3.reshape(number, grid, size, grid, size, 3)
        patches = patches.swapaxes(2, 3).reshape(number, grid * grid, size * size * 3)
        return patches @ kernel.astype(patches.dtype).reshape(-1, self.width)


class VisionTower(nn.Module):
    """ViT from output of `normalize_frames` to the projected class token, not normalised."""

    config: ModelConfig

    @nn.compact
    def __call__(self, images_BxSxSx3: Float[Array, "B S S 3"]) -> Float[Array, "B D"]:
        c, dtype = self.config.vision, self.config.dtype
        init = normal(c.width**-0.5)
        x = PatchEmbedding(c.patch_size, c.width, name="patch")(images_BxSxSx3.astype(dtype))
        class_token = self.param("class_token", init, (c.width,)).astype(dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_token, (len(x), 1, c.width)), x], 1)
        x = x + self.param("positions", init, x.shape[1:]).astype(dtype)
        x = LayerNorm(name="ln_pre")(x)
        x = Transformer(self.config, c.layers, c.heads, name="encoder")(x)
        return _projection(self.config, c.width)(LayerNorm(name="ln_post")(x[:, 0]))


class TextTower(nn.Module):
    """Causal transformer that returns the projected vector, not normalised, of every position."""

    config: ModelConfig

    @nn.compact
    def __call__(self, ids_TxW: Ids) -> Float[Array, "T W D"]:
        c, num_words = self.config.text, ids_TxW.shape[1]
        embed = nn.Embed(c.vocab_size, c.width, embedding_init=normal(0.02), name="tokens")
        positions = self.param("positions", normal(0.01), (c.context_length, c.width))
        x = (embed(ids_TxW) + positions[:num_words]).astype(self.config.dtype)
        causal = jnp.tril(jnp.ones((1, 1, num_words, num_words), bool))
        x = Transformer(self.config, c.layers, c.heads, name="encoder")(x, causal)
        return _projection(self.config, c.width)(LayerNorm(name="ln_final")(x))


def _projection(config: ModelConfig, width: int) -> nn.Dense:
    """Returns the linear map from a tower of a given width to the joint embedding space."""
    options = {"dtype": config.dtype, "kernel_init": normal(width**-0.5)}
    return nn.Dense(config.embed_dim, use_bias=False, name="projection", **options)


class CLIP(nn.Module):
    """Both towers and the learned logit scale."""

    config: ModelConfig

    def setup(self) -> None:
        self.visual = VisionTower(self.config)
        self.textual = TextTower(self.config)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def scale(self) -> Float[Array, ""]:
        """Returns exp(logit_scale), at most 100 (Radford et al., Sec. 2.5)."""
        limit = math.log(100)  # CLIP's weights start here: minimum() would halve the gradient
        return jnp.exp(jnp.where(self.logit_scale > limit, limit, self.logit_scale))
