"""A pair of encoders, of images or videos and of texts, and the scale of their cosines."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from xclip_jax.models.config import ModelConfig, PreprocessConfig
from xclip_jax.models.towers import TextTower, VisionTower
from xclip_jax.models.videoprism import ClassTokenTextTower, VideoTower
from xclip_jax.similarity import AnyArray, FrameMask


def normalize_frames(
    frames_VxFxSxSx3: AnyArray, mask_VxF: FrameMask, preprocess: PreprocessConfig
) -> Float[Array, "V F H W 3"]:
    """Normalises uint8 RGB (float is taken as normalised) and zeroes masked frames."""
    frames = frames_VxFxSxSx3
    if frames.dtype == jnp.uint8:
        mean, std = jnp.array(preprocess.mean), jnp.array(preprocess.std)
        frames = (frames.astype(jnp.float32) / 255 - mean) / std
    return jnp.where(mask_VxF[..., None, None, None], frames, 0)


class CLIP(nn.Module):
    """Both towers, or one of them, and the learned logit scale."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        if c.towers != "text":
            self.visual = VideoTower(c) if c.vision.num_frames else VisionTower(c)
        if c.towers != "vision":
            has_token = c.text.pool == "class_token"
            self.textual = ClassTokenTextTower(c) if has_token else TextTower(c)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def scale(self) -> Float[Array, ""]:
        """Returns exp(logit_scale), at most `max_scale`: 100 in CLIP (Radford et al., Sec. 2.5)."""
        limit = math.log(self.config.max_scale or math.inf)
        # CLIP's weights start at the limit: minimum() would halve the gradient.
        return jnp.exp(jnp.where(self.logit_scale > limit, limit, self.logit_scale))
