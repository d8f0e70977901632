"""The image tower and the text tower of CLIP and of the families in models/families.py.

By default CLIP's (Radford et al., 2021, https://arxiv.org/abs/2103.00020), in the architecture of
https://github.com/openai/CLIP. The fields of VisionConfig and TextConfig turn them into those of
other families. Parameters are float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xclip_jax.models.config import BlockConfig, ModelConfig, VisionConfig
from xclip_jax.models.dense import multiply
from xclip_jax.models.transformer import LayerNorm, Tokens, Transformer, apply_mlp, normal
from xclip_jax.similarity import AnyArray

Ids = Int[AnyArray, "T W"]
Images = Float[AnyArray, "B H W 3"]


class PatchEmbedding(nn.Module):
    """Linear map of square patches, row by row.

    Equals a convolution with stride = size; as a matrix product it is several times as fast on CPU,
    forward and backward.
    """

    size: int
    width: int
    bias: bool = False

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "B L E"]:
        size, shape = self.size, (self.size, self.size, 3, self.width)
        number, rows, columns = len(images), images.shape[1] // size, images.shape[2] // size
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        kernel = self.param("kernel", init, shape).astype(images.dtype)
        images = images[:, : rows * size, : columns * size]  # as a convolution without padding
        patches = images.reshape(number, rows, size, columns, size, 3).swapaxes(2, 3)
        patches = patches.reshape(number, rows * columns, -1)
        embedded = multiply(patches, kernel.reshape(-1, self.width))
        if self.bias:
            zeros = nn.initializers.zeros
            embedded = embedded + self.param("bias", zeros, (self.width,)).astype(images.dtype)
        return jnp.asarray(embedded)


class VisionTower(nn.Module):
    """Vision Transformer from output of `normalize_frames` to vectors that are not normalised."""

    config: ModelConfig

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "B D"]:
        """Returns the projected pooled vectors."""
        c = self.config.vision
        by_class_token = c.pool == "class_token"
        x = self.encode_patches(images, first_only=by_class_token)
        x = LayerNorm(c.epsilon, name="ln_post")(x)
        x = x[:, 0] if by_class_token else AttentionPool(self.config, name="pool")(x)
        return project(self.config, c.projection, x)

    def encode_patches(self, images: Images, *, first_only: bool = False) -> Tokens:
        """Returns the blocks' output for the class token, if any, and every patch.

        With `first_only`, only for the first of them.
        """
        c, dtype = self.config.vision, self.config.compute_dtype
        grid = images.shape[1] // c.patch_size, images.shape[2] // c.patch_size
        embed = PatchEmbedding(c.patch_size, c.width, c.patch_bias, name="patch")
        x, init = embed(images.astype(dtype)), normal(c.width**-0.5)
        if c.class_token:
            class_token = self.param("class_token", init, (c.width,)).astype(dtype)
            x = jnp.concatenate([jnp.broadcast_to(class_token, (len(x), 1, c.width)), x], 1)
        positions = self.param("positions", init, (c.num_positions, c.width))
        x = x + resize_positions(positions, c, grid).astype(dtype)
        if c.pre_norm:
            x = LayerNorm(c.epsilon, name="ln_pre")(x)
        angles = None if c.rotary == "none" else rotary_angles(c, grid)
        options = self.config.blocks("vision"), dtype, self.config.remat
        encoder = Transformer(*options, first_only=first_only, name="encoder")
        return encoder(x, angles=angles)


class AttentionPool(nn.Module):
    """Pooling by the attention of one learned query, then an MLP with a residual connection.

    Zhai et al., 2022, https://arxiv.org/abs/2106.04560, Sec. 3.2 ("multihead attention pooling").
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Tokens) -> Float[Array, "B E"]:
        c, dtype, width = self.config.vision, self.config.compute_dtype, x.shape[-1]
        heads, init = c.pool_heads or c.heads, normal(width**-0.5)
        shape, options = (heads, width // heads), {"dtype": dtype, "kernel_init": init}
        probe = self.param("probe", init, (1, 1, width)).astype(x.dtype)
        query = nn.DenseGeneral(shape, name="query", **options)(probe)
        pair = nn.DenseGeneral((2, *shape), name="key_value", **options)(x)
        query = jnp.broadcast_to(query, (len(x), *query.shape[1:]))
        y = jax.nn.dot_product_attention(query, pair[:, :, 0], pair[:, :, 1])
        y = nn.DenseGeneral(width, (-2, -1), name="out", **options)(y)[:, 0]
        activation, hidden = c.activation or self.config.activation, c.pool_mlp_width or c.mlp_width
        mlp = BlockConfig(mlp_width=hidden, activation=activation)
        return y + apply_mlp(mlp, dtype, LayerNorm(c.epsilon, name="ln")(y))


class TextTower(nn.Module):
    """Transformer that returns the projected vector, not normalised, of every position."""

    config: ModelConfig

    @nn.compact
    def __call__(self, ids_TxW: Ids) -> Float[Array, "T W D"]:
        c, num_words = self.config.text, ids_TxW.shape[1]
        embed = nn.Embed(c.vocab_size, c.width, embedding_init=normal(0.02), name="tokens")
        positions = self.param("positions", normal(0.01), (c.context_length, c.width))
        x = (embed(ids_TxW) + positions[:num_words]).astype(self.config.compute_dtype)
        mask = jnp.tril(jnp.ones((1, 1, num_words, num_words), bool)) if c.causal else None
        blocks = self.config.blocks("text")
        options = self.config.compute_dtype, self.config.remat
        x = Transformer(blocks, *options, name="encoder")(x, mask)
        return project(self.config, c.projection, LayerNorm(c.epsilon, name="ln_final")(x))


def project(config: ModelConfig, kind: str, x: Float[Array, "*B E"]) -> Float[Array, "*B D"]:
    """Maps vectors to the joint embedding space, as a layer of the module that calls it, if any."""
    if kind == "none":
        return x
    options: Any = {"dtype": config.compute_dtype, "kernel_init": normal(x.shape[-1] ** -0.5)}
    return nn.Dense(config.embed_dim, use_bias=kind == "bias", name="projection", **options)(x)


def resize_positions(
    positions_LxE: Float[AnyArray, "L E"], c: VisionConfig, grid: tuple[int, int]
) -> Float[AnyArray, "M E"]:
    """Interpolates the positions of a square of patches, after a class token, to another grid.

    `grid` is (rows, columns). As usual for a ViT at another resolution (Dosovitskiy et al., 2021,
    Sec. 3.2), or bilinear as in PE, both without antialiasing, or as in VideoPrism with it.
    """
    if grid == (c.grid, c.grid):
        return positions_LxE
    token, patches = jnp.split(jnp.asarray(positions_LxE), [int(c.class_token)])
    square, smooth = patches.reshape(c.grid, c.grid, -1), c.position_resize == "antialias"
    method, shape = "bilinear" if smooth else c.position_resize, (*grid, square.shape[-1])
    resized = jax.image.resize(square, shape, method, antialias=smooth)
    return jnp.concatenate([token, resized.reshape(grid[0] * grid[1], -1)])


def rotary_angles(c: VisionConfig, grid: tuple[int, int]) -> Float[np.ndarray, "L H"]:
    """Returns the angles of rotary positions of a grid of (rows, columns) patches.

    A half of the H = K / 2 angles is for the column, the other for the row, in the order of
    `c.rotary`, with frequencies 10000^(-4 j / K). A class token has angle 0. PE (Bolya et al.,
    2025, https://arxiv.org/abs/2504.13181) counts columns and rows from 1 if it has a class token.
    """
    count = c.width // c.heads // 4
    frequencies = 10000.0 ** (-np.arange(count) / count)
    columns_first = c.rotary == "columns_first"
    start = float(columns_first and c.class_token)
    rows, columns = (
        (np.arange(n) + start) * (c.rotary_grid / n if c.rotary_grid else 1) for n in grid
    )
    parts = [np.repeat(rows, grid[1]), np.tile(columns, grid[0])]
    parts = parts[::-1] if columns_first else parts
    angles = np.concatenate([np.outer(part, frequencies) for part in parts], 1)
    token = np.zeros((int(c.class_token), angles.shape[1]))
    return np.concatenate([token, angles]).astype(np.float32)
