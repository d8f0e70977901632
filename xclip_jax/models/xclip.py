"""X-CLIP: CLIP's towers, a temporal encoder and multi-grained similarity fused by AOSM."""

import flax.linen as nn
import jax.numpy as jnp

from xclip_jax.models.clip import Clip, TextConfig, VisionConfig, normalize_frames
from xclip_jax.models.temporal import TemporalLstm, TemporalTransformer
from xclip_jax.similarity import (
    GRANULARITIES,
    TextFeatures,
    VideoFeatures,
    fuse,
    granular_similarity,
)


class XClip(nn.Module):
    """The model of https://arxiv.org/abs/2207.07285 under the `paper` preset.

    `temporal` is one of `none`, `transformer`, `lstm`; `granularities` and `aggregation` as in
    xclip_jax.similarity; `max_words` and `max_frames` are the lengths it was made for.
    """

    vision: VisionConfig
    text: TextConfig
    embed_dim: int
    activation: str = "quick_gelu"
    max_words: int = 32
    max_frames: int = 12
    temporal: str = "transformer"
    temporal_layers: int = 3
    temporal_heads: int = 8
    granularities: tuple[str, ...] = GRANULARITIES
    aggregation: str = "attention"
    tau: float = 0.01
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        options = (self.activation, self.dtype, self.remat)
        self.clip = Clip(self.vision, self.text, self.embed_dim, *options)
        if self.temporal == "transformer":
            self.temporal_encoder = TemporalTransformer(
                self.temporal_layers, self.temporal_heads, self.text.context_length, *options
            )
        elif self.temporal == "lstm":
            self.temporal_encoder = TemporalLstm(self.dtype)

    def __call__(self, ids_TxW, text_mask_TxW, frames, frame_mask_VxF):
        """T x V logits of every text with every video."""
        text = self.encode_text(ids_TxW, text_mask_TxW)
        return self.similarity(text, self.encode_video(frames, frame_mask_VxF))

    def encode_text(self, ids_TxW, mask_TxW):
        """TextFeatures of T x W int ids; mask True from the start token to the end token."""
        words_TxWxD = _normalize(self.clip.encode_words(ids_TxW))
        end_T = jnp.maximum(jnp.sum(mask_TxW, 1) - 1, 0)
        sentence_TxD = jnp.take_along_axis(words_TxWxD, end_T[:, None, None], 1)[:, 0]
        return TextFeatures(sentence_TxD, words_TxWxD, mask_TxW)

    def encode_video(self, frames, mask_VxF):
        """VideoFeatures of V x F x S x S x 3 frames, uint8 raw or float normalised; True = real."""
        images = normalize_frames(frames, mask_VxF)
        flat_VFxD = self.clip.encode_image(images.reshape(-1, *images.shape[2:]))
        frames_VxFxD = flat_VFxD.reshape(*mask_VxF.shape, -1)
        if self.temporal != "none":
            frames_VxFxD = self.temporal_encoder(frames_VxFxD, mask_VxF)
        frames_VxFxD = _normalize(frames_VxFxD)
        real_VxFx1 = mask_VxF[..., None]
        total_VxD = jnp.sum(jnp.where(real_VxFx1, frames_VxFxD, 0), 1)
        # Eq. 2: normalised again, so the sum does for the mean.
        return VideoFeatures(_normalize(total_VxD), frames_VxFxD, mask_VxF)

    def granular_similarity(self, text, video):
        """dict of the enabled granularities' scaled T x V logits; their mean is `similarity`."""
        cosines = granular_similarity(text, video, self.granularities, self.aggregation, self.tau)
        return {name: self.clip.scale() * cosine for name, cosine in cosines.items()}

    def similarity(self, text, video):
        """T x V logits: the scaled mean of the enabled granularities (Eq. 14)."""
        cosines = granular_similarity(text, video, self.granularities, self.aggregation, self.tau)
        return self.clip.scale() * fuse(cosines)


def _normalize(x):
    """L2-normalised float32 vectors; zero vectors stay zero, their gradients finite."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jnp.where(square > 0, jnp.maximum(square, 1e-24), 1) ** -0.5
