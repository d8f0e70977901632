"""The video tower and the text tower of VideoPrism-LvT.

Zhao et al., 2024, https://arxiv.org/abs/2402.13217, in the architecture of
https://github.com/google-deepmind/videoprism. Unlike the towers in `clip`, the video tower relates
the frames of a video and also returns a vector of the whole video.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from xclip_jax.models.config import ModelConfig
from xclip_jax.models.towers import Ids, VisionTower, project
from xclip_jax.models.transformer import LayerNorm, Tokens, Transformer, normal
from xclip_jax.similarity import AnyArray, FrameMask, TextMask


class VideoTower(VisionTower):
    """Factorised video encoder and its pool, to vectors that are not normalised.

    The first blocks see each frame alone, the temporal ones the frames at each patch's place (Arnab
    et al., 2021, https://arxiv.org/abs/2103.15691, Model 2, but all patches are kept), the joint
    ones all patches of all frames. The pool reads all patches of a video, and those of each frame.
    """

    @nn.compact
    def __call__(
        self, frames_VxFxSxSx3: Float[AnyArray, "V F H W 3"], mask_VxF: FrameMask
    ) -> tuple[Float[Array, "V D"], Float[Array, "V F D"]]:
        """Returns the vectors of the videos and those of their frames."""
        c, (videos, frames) = self.config.vision, mask_VxF.shape
        x = self.encode_patches(jax.lax.collapse(jnp.asarray(frames_VxFxSxSx3), 0, 2))
        x = LayerNorm(c.epsilon, name="ln_post")(x)
        patches, mask_VxF = x.shape[1], jnp.asarray(mask_VxF)
        positions = self.param("frame_positions", normal(c.width**-0.5), (c.num_frames, c.width))
        if frames != c.num_frames:  # with antialiasing, unlike the positions of other image towers
            positions = jax.image.resize(positions, (frames, c.width), "bilinear")
        x = x.reshape(videos, frames, patches, -1) + positions[:, None].astype(x.dtype)
        x = x.swapaxes(1, 2).reshape(videos * patches, frames, -1)
        mask = jnp.repeat(mask_VxF, patches, 0)[:, None, None]
        x = LayerNorm(c.epsilon, name="ln_temporal")(self._blocks("temporal")(x, mask))
        x = x.reshape(videos, patches, frames, -1).swapaxes(1, 2)
        x, mask_VxL = x.reshape(videos, frames * patches, -1), jnp.repeat(mask_VxF, patches, 1)
        if c.joint_layers:
            x = self._blocks("joint")(x, mask_VxL[:, None, None])
        pool = ScaledAttentionPool(self.config, name="pool")
        pooled_VFxD = pool(x.reshape(videos * frames, patches, -1))
        return pool(x, mask_VxL), pooled_VFxD.reshape(videos, frames, -1)

    def _blocks(self, name: str) -> Transformer:
        """Returns the temporal or the joint blocks, as a layer of this module."""
        config, layers = self.config, getattr(self.config.vision, f"{name}_layers")
        blocks = dataclasses.replace(config.blocks("vision"), layers=layers)
        return Transformer(blocks, config.compute_dtype, config.remat, name=name)


class ScaledAttentionPool(nn.Module):
    """Pooling by the attention of one learned query, of which each dimension has a learned scale.

    Heads are four times as wide as those of the blocks. As the pool of CoCa (Yu et al., 2022,
    https://arxiv.org/abs/2205.01917, Sec. 3.2) in VideoPrism's code.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Tokens, mask_BxL: TextMask | FrameMask | None = None
    ) -> Float[Array, "B E"]:
        c, dtype, width = self.config.vision, self.config.compute_dtype, x.shape[-1]
        shape = (c.heads, 4 * width // c.heads)
        options: Any = {"dtype": dtype, "kernel_init": normal(width**-0.5)}
        probe = self.param("probe", normal(width**-0.5), (1, 1, width)).astype(x.dtype)
        query = nn.DenseGeneral(shape, name="query", **options)(probe)
        pair = nn.DenseGeneral((2, *shape), name="key_value", **options)(x)
        # softplus(0) = ln 2: the factor is 1 at the start.
        scale = self.param("scale", nn.initializers.zeros, shape[-1:])
        query = query * (jax.nn.softplus(scale) / math.log(2)).astype(x.dtype)
        query = jnp.broadcast_to(query, (len(x), *query.shape[1:]))
        mask = None if mask_BxL is None else mask_BxL[:, None, None]
        y = jax.nn.dot_product_attention(query, pair[:, :, 0], pair[:, :, 1], mask=mask)
        y = nn.DenseGeneral(width, (-2, -1), name="out", **options)(y)[:, 0]
        return LayerNorm(c.epsilon, name="ln")(y)


class ClassTokenTextTower(nn.Module):
    """Causal Transformer with sinusoidal positions and a class token after the text.

    Returns the projected vectors of all W positions, then that of the class token, which attends to
    all real tokens. CoCa (Yu et al., 2022, https://arxiv.org/abs/2205.01917).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, ids_TxW: Ids, mask_TxW: TextMask) -> Float[Array, "T W+1 D"]:
        c, dtype, (texts, num_words) = self.config.text, self.config.compute_dtype, ids_TxW.shape
        embed = nn.Embed(c.vocab_size, c.width, embedding_init=normal(c.width**-0.5), name="tokens")
        token = self.param("class_token", normal(c.width**-0.5), (c.width,))
        x = embed(ids_TxW) * c.width**0.5 + sinusoidal_positions(num_words, c.width)
        token = jnp.broadcast_to(token * c.width**0.5, (texts, 1, c.width))
        x = jnp.concatenate([x, token], 1).astype(dtype)
        mask = jnp.pad(jnp.asarray(mask_TxW), ((0, 0), (0, 1)), constant_values=True)[:, None, None]
        mask = mask & jnp.tril(jnp.ones((num_words + 1, num_words + 1), bool))
        blocks = self.config.blocks("text")
        x = Transformer(blocks, dtype, self.config.remat, name="encoder")(x, mask)
        return project(self.config, c.projection, LayerNorm(c.epsilon, name="ln_final")(x))


def sinusoidal_positions(length: int, width: int) -> Float[np.ndarray, "L E"]:
    """Returns sines, then cosines, of L positions times frequencies from 1 down to 1 / 10000.

    As in tensor2tensor: the last frequency is reached, unlike in Vaswani et al., 2017, Sec. 3.5.
    """
    frequencies = np.geomspace(1, 1e-4, width // 2)
    angles = np.outer(np.arange(length), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)
