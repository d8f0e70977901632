"""X-CLIP: CLIP's towers, a temporal encoder and multi-grained similarity fused by AOSM."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xclip_jax import similarity
from xclip_jax.models.clip import CLIP, normalize_frames
from xclip_jax.models.config import ModelConfig, TextConfig
from xclip_jax.models.heads import AggregationMatrices, PairTransformer, TokenWeights
from xclip_jax.models.temporal import Frames, TemporalLSTM, TemporalTransformer
from xclip_jax.models.towers import Ids
from xclip_jax.similarity import (
    AnyArray,
    FrameMask,
    Logits,
    Tau,
    TextFeatures,
    TextMask,
    VideoFeatures,
)


class XClip(nn.Module):
    """The model of https://arxiv.org/abs/2207.07285, or a baseline, for a resolved config."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.clip = CLIP(c)
        if c.temporal.type != "none":
            encoders = {"transformer": TemporalTransformer, "lstm": TemporalLSTM}
            self.temporal_encoder = encoders[c.temporal.type](c)
        if c.matrices:
            self.aggregation_matrices = AggregationMatrices(c)
        if c.aggregation == "weighted":
            self.word_weights, self.frame_weights = TokenWeights(), TokenWeights()
        if c.tau_learned:
            self.log_tau = self.param("log_tau", nn.initializers.constant(math.log(c.tau)), ())
        if c.logit_bias:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(-10.0), ())
        if not c.has_granularities:
            self.pair_encoder = PairTransformer(c)

    def __call__(
        self, ids_TxW: Ids, text_mask: TextMask, frames_VxFxSxSx3: AnyArray, frame_mask: FrameMask
    ) -> Logits:
        """Returns the logits of every text with every video."""
        text = self.encode_text(ids_TxW, text_mask)
        return self.similarity(text, self.encode_video(frames_VxFxSxSx3, frame_mask))

    def encode_text(self, ids_TxW: Ids, mask_TxW: TextMask) -> TextFeatures:
        """Returns the features of texts, whose mask is True from the start to the end token."""
        num_words, has_token = ids_TxW.shape[1], self.config.text.pool == "class_token"
        tower: Any = self.clip.textual
        tokens = tower(ids_TxW, mask_TxW) if has_token else tower(ids_TxW)
        tokens = tokens.astype(jnp.float32)
        is_weighted = self.config.aggregation == "weighted"
        weights_TxW = self.word_weights(tokens[:, :num_words]) if is_weighted else None
        if self.config.head != "tight_transformer":
            tokens = normalize(tokens)
        place_T = sentence_position(ids_TxW, self.config.text)
        sentence_TxD = jnp.take_along_axis(tokens, place_T[:, None, None], 1)[:, 0]
        return TextFeatures(sentence_TxD, tokens[:, :num_words], mask_TxW, weights_TxW)

    def encode_video(self, frames_VxFxSxSx3: AnyArray, mask_VxF: FrameMask) -> VideoFeatures:
        """Returns the features of videos: uint8 raw RGB, or float already normalised."""
        own_VxD, clip_VxFxD = self.encode_frames(frames_VxFxSxSx3, mask_VxF)
        if self.config.head == "tight_transformer":
            clip_VxFxD = clip_VxFxD.astype(jnp.float32)
            count_Vx1 = jnp.maximum(jnp.sum(mask_VxF, 1, keepdims=True), 1)
            mean_VxD = _masked_sum(clip_VxFxD, mask_VxF) / count_Vx1
            return VideoFeatures(mean_VxD, clip_VxFxD, mask_VxF)
        related_VxFxD = self.relate_frames(clip_VxFxD, mask_VxF)
        temporal_VxFxD = normalize(related_VxFxD)
        # Eq. 2: the result is normalised, so the sum serves as the mean.
        video_VxD = _masked_sum(temporal_VxFxD, mask_VxF)
        if own_VxD is not None and self.config.temporal.type == "none":
            video_VxD = own_VxD
        video_VxD = normalize(video_VxD)
        from_clip, weights_VxF = self.config.frame_features == "clip", None
        if self.config.aggregation == "weighted":
            raw_VxFxD = clip_VxFxD if from_clip else related_VxFxD
            weights_VxF = self.frame_weights(raw_VxFxD.astype(jnp.float32))
        frames_VxFxD = normalize(clip_VxFxD) if from_clip else temporal_VxFxD
        return VideoFeatures(video_VxD, frames_VxFxD, mask_VxF, weights_VxF)

    def encode_frames(
        self, frames_VxFxSxSx3: AnyArray, mask_VxF: FrameMask
    ) -> tuple[Float[Array, "V D"] | None, Frames]:
        """Returns the encoder's vectors, not normalised, of videos (a video tower) and frames."""
        images = normalize_frames(frames_VxFxSxSx3, mask_VxF, self.config.preprocess)
        tower: Any = self.clip.visual
        if self.config.vision.num_frames:
            return tower(images, mask_VxF)
        flat_VFxD = tower(jax.lax.collapse(images, 0, 2))
        return None, flat_VFxD.reshape(*mask_VxF.shape, -1)

    def relate_frames(self, clip_VxFxD: Frames, mask_VxF: FrameMask) -> Frames:
        """Returns the temporal encoder's output (Eq. 1), with or without the release's residual."""
        if self.config.temporal.type == "none":
            return clip_VxFxD
        encoded_VxFxD = self.temporal_encoder(clip_VxFxD, mask_VxF)
        return encoded_VxFxD + clip_VxFxD if self.config.temporal.residual else encoded_VxFxD

    def similarity(self, text: TextFeatures, video: VideoFeatures) -> Logits:
        """Returns logits: the mean of the enabled granularities (Eq. 14), scaled."""
        if not self.config.has_granularities:
            masks = self.aosm_words(text.mask), self.aosm_frames(video.mask)
            return self.pair_encoder(text, video, *masks) + self._bias()
        return self.similarities(text, video)["all"]

    def similarities(self, text: TextFeatures, video: VideoFeatures) -> dict[str, Logits]:
        """Returns the logits of each enabled granularity, and their mean (Eq. 14) as "all"."""
        parts: dict[str, Logits] = self.granular_similarity(text, video)
        return {**parts, "all": functools.reduce(jnp.add, parts.values()) / len(parts)}

    def granular_similarity(self, text: TextFeatures, video: VideoFeatures) -> dict[str, Logits]:
        """Returns the scaled logits of each enabled granularity.

        Raises ValueError if the model scores pairs with a Transformer, or its learned matrices are
        for other lengths than those of the features.
        """
        c = self.config
        if not c.has_granularities:
            raise ValueError("a model that scores pairs with a Transformer has no granularities")
        lengths, fixed = (text.mask.shape[1], video.mask.shape[1]), (c.max_words, c.max_frames)
        if c.matrices and lengths != fixed:
            actual = "features of {} words and {} frames".format(*lengths)
            raise ValueError(f"{actual}: the learned matrices are for {fixed[0]} and {fixed[1]}")
        words, frames = self.aosm_words(text.mask), self.aosm_frames(video.mask)
        options: Any = {"words_TxW": words, "frames_VxF": frames, "matrices": self.matrices()}
        options |= {"granularities": c.granularities, "aggregation": c.aggregation}
        options |= {"tau": self.tau()}
        similarities = similarity.granular_similarity(text, video, **options)
        scale, bias = self.clip.scale(), self._bias()
        return {name: scale * value + bias for name, value in similarities.items()}

    def _bias(self) -> Float[Array, ""] | float:
        """Returns the offset of logits (SigLIP, https://arxiv.org/abs/2303.15343), 0 if none."""
        return self.logit_bias if self.config.logit_bias else 0.0

    def word_frame_attention(
        self, text: TextFeatures, video: VideoFeatures
    ) -> Float[Array, "V W F"]:
        """Returns AOSM's weights of the word-frame cells of one text (T = 1) with V videos."""
        options = {"tau": self.tau(), "matrices": self.matrices()}
        attention = functools.partial(similarity.word_frame_attention, **options)
        weigh = jax.vmap(attention, in_axes=(None, 0, None, 0))
        words_W, frames_VxF = self.aosm_words(text.mask)[0], self.aosm_frames(video.mask)
        return weigh(text.words[0], video.frames, words_W, frames_VxF)

    def aosm_words(self, mask_TxW: TextMask) -> TextMask:
        """Returns the mask of the words that take part in AOSM."""
        c = self.config
        options = {"special_tokens": c.words == "all_tokens", "padding": c.padding == "competes"}
        options |= {"start_token": c.text.start_token, "end_token": c.text.end_token}
        return similarity.aosm_words(mask_TxW, **options)

    def aosm_frames(self, mask_VxF: FrameMask) -> FrameMask:
        """Returns the mask of the frames that take part in AOSM."""
        mask_VxF = jnp.asarray(mask_VxF)
        return jnp.ones_like(mask_VxF) if self.config.padding == "competes" else mask_VxF

    def tau(self) -> Tau:
        """Returns the temperature of AOSM, learned or constant."""
        return jnp.exp(self.log_tau) if self.config.tau_learned else self.config.tau

    def matrices(self) -> dict[str, Array]:
        """Returns the learned matrices by name, or {} if the model has none."""
        return self.aggregation_matrices() if self.config.matrices else {}


def sentence_position(ids_TxW: Ids, c: TextConfig) -> Int[Array, " T"]:
    """Returns the position, from 0, whose vector is the sentence's.

    CLIP takes the largest id, which is the end token, the newer models of transformers the first
    end token, SigLIP the last position, be it padding or not. A class token is at position W.
    """
    if c.pool in ("last", "class_token"):
        return jnp.full(len(ids_TxW), ids_TxW.shape[1] - (c.pool == "last"))
    return jnp.argmax(ids_TxW if c.pool == "argmax" else ids_TxW == c.end_id, 1)


def _masked_sum(frames_VxFxD: Frames, mask_VxF: FrameMask) -> Float[Array, "V D"]:
    return jnp.sum(jnp.where(mask_VxF[..., None], frames_VxFxD, 0), 1)


def normalize(x: Float[AnyArray, "*B D"]) -> Float[Array, "*B D"]:
    """Returns L2-normalised float32 vectors, where zero vectors stay zero with finite gradients."""
    x = jnp.asarray(x, jnp.float32)
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jnp.where(square > 0, jnp.maximum(square, 1e-24), 1) ** -0.5
