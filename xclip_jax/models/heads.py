"""Alternatives and additions to plain AOSM: learned matrices, Transformers over each pair."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xclip_jax.models.clip import ACTIVATIONS, LayerNorm, Transformer
from xclip_jax.models.config import ModelConfig
from xclip_jax.similarity import AnyArray, TextFeatures, VideoFeatures


class AggregationMatrices(nn.Module):
    """Learned matrices of the PyTorch X-CLIP (not in the paper), initialised to the identity.

    They transform the joint space (D x D) or the attention over words (W x W) and frames (F x F),
    so that a model works for these lengths only. The output is a dict of name -> square matrix.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        c = self.config
        sizes = {
            "video_sentence": {"video_sentence": c.embed_dim},
            "video_word": {"video_word": c.max_words},
            "frame_sentence": {"frame_sentence": c.max_frames},
            "frame_word": {
                "frame_word": c.embed_dim,
                "frame_word_words": c.max_words,
                "frame_word_frames": c.max_frames,
                "frame_word_words_2": c.max_words,
                "frame_word_frames_2": c.max_frames,
            },
        }

        def identity(key: Array, size: int) -> Array:
            del key
            return jnp.eye(size, dtype=jnp.float32)

        return {
            name: self.param(name, identity, size)
            for granularity in c.granularities
            for name, size in sizes[granularity].items()
        }


class TightTransformer(nn.Module):
    """CLIP4Clip's tight head (https://arxiv.org/abs/2104.08860): a Transformer for each pair.

    Its input is the raw sentence vector followed by the raw frame vectors.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, text: TextFeatures, video: VideoFeatures) -> Float[Array, "T V"]:
        c = self.config
        tokens, mask = _pair([text.sentence[:, None]], [video.frames], None, video.mask)
        init = nn.initializers.normal(0.01)
        positions = self.param("positions", init, (c.text.context_length, tokens.shape[-1]))
        x = tokens.astype(c.dtype) + positions[: tokens.shape[1]].astype(c.dtype)
        x = Transformer(c, c.temporal.layers, c.temporal.heads, name="encoder")(x, mask)
        first = LayerNorm(name="ln_pool")(x)[:, 0].astype(jnp.float32)
        pooled = ACTIVATIONS["quick_gelu"](nn.Dense(first.shape[-1], name="pool")(first))
        scores = nn.Dense(1, name="score")(pooled)
        return scores.reshape(len(text.mask), len(video.mask))


class FusionTransformer(nn.Module):
    """A fusion Transformer after Table 14 and Fig. 6 of the paper, which leaves details open.

    A pre-norm Transformer over the sentence, word, video and frame vectors of a pair, each plus a
    learned vector for its kind. A linear layer maps the sentence's output to the score. The masks
    are those of AOSM.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        text: TextFeatures,
        video: VideoFeatures,
        words_TxW: Bool[Array, "T W"],
        frames_VxF: Bool[Array, "V F"],
    ) -> Float[Array, "T V"]:
        c = self.config
        dim = text.sentence.shape[-1]
        kinds = self.param("kinds", nn.initializers.normal(dim**-0.5), (4, dim))
        tokens, mask = _pair(
            [text.sentence[:, None] + kinds[0], text.words + kinds[1]],
            [video.video[:, None] + kinds[2], video.frames + kinds[3]],
            words_TxW,
            frames_VxF,
        )
        x = tokens.astype(c.dtype)
        x = Transformer(c, c.temporal.layers, c.temporal.heads, name="encoder")(x, mask)
        first = LayerNorm(name="ln")(x)[:, 0].astype(jnp.float32)
        scores = nn.Dense(1, name="score")(first)
        return scores.reshape(len(words_TxW), len(frames_VxF))


def _pair(
    text_parts: Sequence[AnyArray],
    video_parts: Sequence[AnyArray],
    words_TxW: AnyArray | None,
    frames_VxF: AnyArray,
) -> tuple[Array, Array]:
    """Returns each text's vectors followed by each video's, TV x L x D, and their attention mask.

    The first part of each side is always attended to, the masks apply to the second.
    """
    text, video = jnp.concatenate(text_parts, 1), jnp.concatenate(video_parts, 1)

    def extend(mask: AnyArray | None, x: Array) -> Array:
        mask = jnp.ones((len(x), 0), bool) if mask is None else mask
        return jnp.pad(mask, ((0, 0), (x.shape[1] - mask.shape[1], 0)), constant_values=True)

    def combine(a: Array, b: Array) -> Array:
        shape = len(text), len(video)
        a = jnp.broadcast_to(a[:, None], (*shape, *a.shape[1:]))
        b = jnp.broadcast_to(b[None], (*shape, *b.shape[1:]))
        return jax.lax.collapse(jnp.concatenate([a, b], 2), 0, 2)

    mask = combine(extend(words_TxW, text), extend(frames_VxF, video))
    return combine(text, video), mask[:, None, None, :]
