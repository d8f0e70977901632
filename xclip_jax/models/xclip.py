"""X-CLIP: CLIP's towers, a temporal encoder and multi-grained similarity fused by AOSM."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from xclip_jax.models.clip import Clip, TextConfig, VisionConfig, normalize_frames
from xclip_jax.models.heads import AggregationMatrices, FusionTransformer, TightTransformer
from xclip_jax.models.temporal import TemporalLstm, TemporalTransformer
from xclip_jax.similarity import (
    GRANULARITIES,
    Competition,
    TextFeatures,
    VideoFeatures,
    fuse,
    granular_similarity,
    mixed_weights,
    word_frame_attention,
)


class XClip(nn.Module):
    """The model of https://arxiv.org/abs/2207.07285; by default its `paper` preset.

    Attributes:
        max_words, max_frames: the lengths it was made for.
        temporal: temporal encoder, `none`, `transformer` or `lstm`.
        temporal_residual: whether the CLIP frames are added to its output (the release).
        frame_features: what frame-sentence and frame-word see: `temporal`, the temporal encoder's
            output (Eq. 1), or `clip`, what goes into it (the release).
        words: what counts as a word: `word_tokens`, or `all_tokens`, start and end too.
        padding: `masked`, or `competes`: padded words and frames take part in AOSM (the release).
        matrices: whether learned matrices weigh the aggregation (the release).
        granularities, aggregation, tau: as in xclip_jax.similarity.
        fusion: how scores come about: `mean` of the granularities (Eq. 14), `transformer`
            (Table 14) or `tight_transformer` (CLIP4Clip's head).
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
    temporal_residual: bool = False
    frame_features: str = "temporal"
    words: str = "word_tokens"
    padding: str = "masked"
    matrices: bool = False
    granularities: tuple[str, ...] = GRANULARITIES
    aggregation: str = "attention"
    tau: float = 0.01
    fusion: str = "mean"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        options = (self.activation, self.dtype, self.remat)
        sizes = (self.temporal_layers, self.temporal_heads)
        positions = self.text.context_length
        self.clip = Clip(self.vision, self.text, self.embed_dim, *options)
        if self.temporal == "transformer":
            self.temporal_encoder = TemporalTransformer(*sizes, positions, *options)
        elif self.temporal == "lstm":
            self.temporal_encoder = TemporalLstm(self.dtype)
        if self.matrices:
            lengths = (self.max_words, self.max_frames, self.embed_dim)
            self.aggregation_matrices = AggregationMatrices(*lengths, self.granularities)
        if self.fusion == "tight_transformer":
            self.pair_encoder = TightTransformer(*sizes, positions, *options)
        elif self.fusion == "transformer":
            self.pair_encoder = FusionTransformer(*sizes, *options)

    def __call__(self, ids_TxW, text_mask_TxW, frames, frame_mask_VxF):
        """T x V logits of every text with every video."""
        text = self.encode_text(ids_TxW, text_mask_TxW)
        return self.similarity(text, self.encode_video(frames, frame_mask_VxF))

    def encode_text(self, ids_TxW, mask_TxW):
        """TextFeatures of T x W int ids; mask True from the start token to the end token."""
        words_TxWxD = self.clip.encode_words(ids_TxW).astype(jnp.float32)
        if self.fusion != "tight_transformer":
            words_TxWxD = _normalize(words_TxWxD)
        end_T = jnp.maximum(jnp.sum(mask_TxW, 1) - 1, 0)
        sentence_TxD = jnp.take_along_axis(words_TxWxD, end_T[:, None, None], 1)[:, 0]
        return TextFeatures(sentence_TxD, words_TxWxD, mask_TxW)

    def encode_video(self, frames, mask_VxF):
        """VideoFeatures of V x F x S x S x 3 frames, uint8 raw or float normalised; True = real."""
        images = normalize_frames(frames, mask_VxF)
        flat_VFxD = self.clip.encode_image(images.reshape(-1, *images.shape[2:]))
        clip_VxFxD = flat_VFxD.reshape(*mask_VxF.shape, -1)
        if self.fusion == "tight_transformer":
            clip_VxFxD = clip_VxFxD.astype(jnp.float32)
            count_Vx1 = jnp.maximum(jnp.sum(mask_VxF, 1, keepdims=True), 1)
            mean_VxD = _masked_sum(clip_VxFxD, mask_VxF) / count_Vx1
            return VideoFeatures(mean_VxD, clip_VxFxD, mask_VxF)
        temporal_VxFxD = _normalize(self._encode_time(clip_VxFxD, mask_VxF))
        # Eq. 2: normalised again, so the sum does for the mean.
        video_VxD = _normalize(_masked_sum(temporal_VxFxD, mask_VxF))
        before = self.frame_features == "clip"
        return VideoFeatures(
            video_VxD, _normalize(clip_VxFxD) if before else temporal_VxFxD, mask_VxF
        )

    def _encode_time(self, clip_VxFxD, mask_VxF):
        """Eq. 1, with or without the release's residual."""
        if self.temporal == "none":
            return clip_VxFxD
        encoded_VxFxD = self.temporal_encoder(clip_VxFxD, mask_VxF)
        return encoded_VxFxD + clip_VxFxD if self.temporal_residual else encoded_VxFxD

    def granular_similarity(self, text, video):
        """dict of the enabled granularities' scaled T x V logits; their mean is `similarity`.

        Raises:
            ValueError: the model has no granularities but a Transformer for every pair.
        """
        if self.fusion != "mean":
            raise ValueError(f"a model with {self.fusion} fusion has no granularities")
        self._check_lengths(text, video)
        similarities = granular_similarity(
            text,
            video,
            self.granularities,
            self.aggregation,
            self.tau,
            self.competition,
            self.aggregation_matrices() if self.matrices else None,
        )
        return {name: self.clip.scale() * value for name, value in similarities.items()}

    def similarity(self, text, video):
        """T x V logits: the scaled mean of the enabled granularities (Eq. 14)."""
        if self.fusion == "tight_transformer":
            return self.pair_encoder(text, video)
        if self.fusion == "transformer":
            return self.pair_encoder(text, video, self.competition)
        return fuse(self.granular_similarity(text, video))

    def word_frame_attention(self, text, video):
        """V x W x F: of one text (T = 1) and V videos, see xclip_jax.similarity."""
        words_W, frames_VxF = (
            self.competition.words(text.mask)[0],
            self.competition.frames(video.mask),
        )
        matrices = self.aggregation_matrices() if self.matrices else None

        def of_video(frames_FxD, frames_F):
            return word_frame_attention(
                text.words[0], frames_FxD, words_W, frames_F, self.tau, matrices
            )

        return jax.vmap(of_video)(video.frames, frames_VxF)

    def frame_attention(self, text, video):
        """V x F: how much AOSM looks at each frame of V videos for one text (T = 1).

        The mean of its weights in frame-sentence (Eq. 7) and in frame-word (Eq. 9-13), of those of
        them that the model has; one that has neither looks where the sentence's cosine is largest.
        Masked frames get 0.
        """
        matrices = self.aggregation_matrices() if self.matrices else {}
        names = self.granularities if self.fusion == "mean" else ()
        found = []
        if "frame_word" in names:
            found.append(jnp.sum(self.word_frame_attention(text, video), 1))
        if "frame_sentence" in names or not found:
            frames_VxFxD = _normalize(video.frames)
            scores_VxF = frames_VxFxD @ _normalize(text.sentence[0])
            mask_VxF = self.competition.frames(video.mask)
            matrix = matrices.get("frame_sentence")
            found.append(mixed_weights(scores_VxF, mask_VxF, 1, self.tau, matrix))
        return jnp.where(video.mask, sum(found) / len(found), 0)

    def search_vector(self, text):
        """T x D: its inner product with a video's vector is their similarity (Eq. 3), unscaled."""
        if self.matrices and "video_sentence" in self.granularities:
            return text.sentence @ self.aggregation_matrices()["video_sentence"]
        return _normalize(text.sentence)

    @property
    def competition(self):
        """Which words and frames take part in AOSM."""
        return Competition(self.words == "all_tokens", self.padding == "competes")

    def pair_cells(self, num_words, num_frames):
        """Working memory of one text-video pair in numbers, roughly: blocks are cut by it."""
        if self.fusion == "mean":
            return num_words * num_frames
        tokens = num_frames + (1 if self.fusion == "tight_transformer" else 2 + num_words)
        return 8 * self.embed_dim * tokens

    def _check_lengths(self, text, video):
        found = text.mask.shape[1], video.mask.shape[1]
        if self.matrices and found != (self.max_words, self.max_frames):
            raise ValueError(
                f"{found[0]} words and {found[1]} frames, but the model's learned matrices are "
                f"for {self.max_words} and {self.max_frames}"
            )


def _masked_sum(frames_VxFxD, mask_VxF):
    return jnp.sum(jnp.where(mask_VxF[..., None], frames_VxFxD, 0), 1)


def _normalize(x):
    """L2-normalised float32 vectors; zero vectors stay zero, their gradients finite."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jnp.where(square > 0, jnp.maximum(square, 1e-24), 1) ** -0.5
