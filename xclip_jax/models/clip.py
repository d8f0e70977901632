"""CLIP's two towers (Radford et al., 2021, https://arxiv.org/abs/2103.00020).

Architecture and parameter shapes follow https://github.com/openai/CLIP; layers are stacked along a
leading axis and scanned. Parameters are float32; `dtype` is the compute type.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]: CLIP's preprocessing
STD = (0.26862954, 0.26130258, 0.27577711)
# What of a layer is kept for the backward pass, the rest is computed again: nothing, or the results
# of its matrix products.
REMAT = {
    "layers": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image tower. `image_size` and `patch_size` in pixels."""

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower. `context_length` in tokens."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8


class LayerNorm(nn.Module):
    """Layer normalisation in float32, handed back in the type it came in."""

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name="norm")(x).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, x: B x L x E, mask: broadcastable to B x 1 x L x L, True = see."""

    heads: int
    dtype: jnp.dtype
    output_scale: float

    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        init = nn.initializers.normal(width**-0.5)
        qkv = nn.DenseGeneral(
            (3, self.heads, width // self.heads), dtype=self.dtype, kernel_init=init, name="qkv"
        )(x)
        query, key, value = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        y = _attend(query, key, value, mask)
        init = nn.initializers.normal(width**-0.5 * self.output_scale)
        return nn.DenseGeneral(width, (-2, -1), dtype=self.dtype, kernel_init=init, name="out")(y)


def _attend(query_BxLxNxK, key_BxLxNxK, value_BxLxNxK, mask):
    """Scaled dot-product attention, softmax in float32; finite where a row sees nothing."""
    scale = query_BxLxNxK.shape[-1] ** -0.5
    scores = jnp.einsum("bqnk,bsnk->bnqs", query_BxLxNxK, key_BxLxNxK).astype(jnp.float32) * scale
    if mask is not None:
        scores = jnp.where(mask, scores, -1e6)
    weights = jax.nn.softmax(scores).astype(value_BxLxNxK.dtype)
    return jnp.einsum("bnqs,bsnk->bqnk", weights, value_BxLxNxK)


class Block(nn.Module):
    """Pre-norm transformer block; (x, mask) -> (x, None), the form that nn.scan wants."""

    heads: int
    activation: str
    dtype: jnp.dtype
    layers: int

    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        depth = (2 * self.layers) ** -0.5  # CLIP's initialisation keeps the residual stream level
        x = x + Attention(self.heads, self.dtype, depth, name="attention")(
            LayerNorm(name="ln_1")(x), mask
        )
        init = nn.initializers.normal((2 * width) ** -0.5)
        y = nn.Dense(4 * width, dtype=self.dtype, kernel_init=init, name="fc")(
            LayerNorm(name="ln_2")(x)
        )
        init = nn.initializers.normal(width**-0.5 * depth)
        y = nn.Dense(width, dtype=self.dtype, kernel_init=init, name="proj")(
            ACTIVATIONS[self.activation](y)
        )
        return x + y, None


class Transformer(nn.Module):
    """`layers` blocks, scanned: parameters carry a leading layer axis."""

    layers: int
    heads: int
    activation: str = "quick_gelu"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x, mask=None):
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        return blocks(self.heads, self.activation, self.dtype, self.layers, name="blocks")(x, mask)[
            0
        ]


def normalize_frames(frames, mask):
    """Pixels as CLIP wants them.

    Args:
        frames: V x F x S x S x 3, uint8 raw RGB, or float already normalised.
        mask: V x F bool; masked frames become 0 after normalisation.
    """
    if frames.dtype == jnp.uint8:
        frames = (frames.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
    return jnp.where(mask[..., None, None, None], frames, 0)


class PatchEmbedding(nn.Module):
    """Square patches, row by row, through one linear map: N x S x S x 3 -> N x patches x width.

    A convolution with stride = size, written as the matrix product it is: several times as fast on
    CPU, forward and backward.
    """

    size: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images_NxSxSx3):
        number, side = images_NxSxSx3.shape[:2]
        grid, size = side // self.size, self.size
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        kernel = self.param("kernel", init, (size, size, 3, self.width))
        patches = images_NxSxSx3.reshape(number, grid, size, grid, size, 3)
        patches = patches.swapaxes(2, 3).reshape(number, grid * grid, size * size * 3)
        return patches @ kernel.astype(self.dtype).reshape(-1, self.width)


class VisionTower(nn.Module):
    """ViT: N x S x S x 3 normalised images -> N x D, the projected class token."""

    config: VisionConfig
    embed_dim: int
    activation: str
    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, images_NxSxSx3):
        c = self.config
        scale = nn.initializers.normal(c.width**-0.5)
        embed = PatchEmbedding(c.patch_size, c.width, self.dtype, name="patch")
        x = embed(images_NxSxSx3.astype(self.dtype))
        class_token = self.param("class_token", scale, (c.width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_token, (len(x), 1, c.width)), x], 1)
        x = x + self.param("positions", scale, x.shape[1:]).astype(self.dtype)
        x = LayerNorm(name="ln_pre")(x)
        x = Transformer(c.layers, c.heads, self.activation, self.dtype, self.remat, name="encoder")(
            x
        )
        x = LayerNorm(name="ln_post")(x[:, 0])
        project = nn.Dense(
            self.embed_dim, use_bias=False, dtype=self.dtype, kernel_init=scale, name="projection"
        )
        return project(x)


class TextTower(nn.Module):
    """Causal transformer: T x W ids -> T x W x D, every position normalised and projected."""

    config: TextConfig
    embed_dim: int
    activation: str
    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, ids_TxW):
        c = self.config
        embed = nn.Embed(
            c.vocab_size, c.width, embedding_init=nn.initializers.normal(0.02), name="tokens"
        )
        positions = self.param(
            "positions", nn.initializers.normal(0.01), (c.context_length, c.width)
        )
        num_words = ids_TxW.shape[1]
        x = (embed(ids_TxW) + positions[:num_words]).astype(self.dtype)
        causal = jnp.tril(jnp.ones((num_words, num_words), bool))
        x = Transformer(c.layers, c.heads, self.activation, self.dtype, self.remat, name="encoder")(
            x, causal
        )
        project = nn.Dense(
            self.embed_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(c.width**-0.5),
            name="projection",
        )
        return project(LayerNorm(name="ln_final")(x))


class Clip(nn.Module):
    """Both towers and the learned logit scale."""

    vision: VisionConfig
    text: TextConfig
    embed_dim: int
    activation: str = "quick_gelu"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        shared = (self.embed_dim, self.activation, self.dtype, self.remat)
        self.visual = VisionTower(self.vision, *shared)
        self.textual = TextTower(self.text, *shared)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def encode_image(self, images_NxSxSx3):
        """N x D projected image vectors, not normalised; pixels as from `normalize_frames`."""
        return self.visual(images_NxSxSx3)

    def encode_words(self, ids_TxW):
        """T x W x D projected token vectors, not normalised."""
        return self.textual(ids_TxW)

    def scale(self):
        """exp(logit_scale), at most 100 (Radford et al., Sec. 2.5)."""
        limit = math.log(100)  # where CLIP's weights start; the gradient there must not be cut off
        return jnp.exp(jnp.where(self.logit_scale > limit, limit, self.logit_scale))
