"""What turns features into scores besides plain AOSM: learned matrices, pair-wise Transformers."""

import flax.linen as nn
import jax.numpy as jnp

from xclip_jax.models.clip import ACTIVATIONS, LayerNorm, Transformer


class AggregationMatrices(nn.Module):
    """The learned matrices of the PyTorch X-CLIP, identities at the start; not in the paper.

    They weigh the joint space (D x D), or the attention over words (W x W) and frames (F x F), and
    so tie a model to its lengths. A dict of name -> square matrix, for the enabled granularities.
    """

    words: int
    frames: int
    dim: int
    granularities: tuple[str, ...]

    @nn.compact
    def __call__(self):
        sizes = {
            "video_sentence": {"video_sentence": self.dim},
            "video_word": {"video_word": self.words},
            "frame_sentence": {"frame_sentence": self.frames},
            "frame_word": {
                "frame_word": self.dim,
                "frame_word_words": self.words,
                "frame_word_frames": self.frames,
                "frame_word_words_2": self.words,
                "frame_word_frames_2": self.frames,
            },
        }

        def identity(_, shape):
            return jnp.eye(shape[0], dtype=jnp.float32)

        return {
            name: self.param(name, identity, (size, size))
            for granularity in self.granularities
            for name, size in sizes[granularity].items()
        }


class TightTransformer(nn.Module):
    """CLIP4Clip's tight head (https://arxiv.org/abs/2104.08860): a Transformer for every pair.

    Sees the raw sentence vector followed by the raw frame vectors; gives T x V scores.
    """

    layers: int
    heads: int
    positions: int
    activation: str = "quick_gelu"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, text, video):
        tokens, mask = _pairs([text.sentence[:, None]], [video.frames], None, video.mask)
        init = nn.initializers.normal(0.01)
        positions = self.param("positions", init, (self.positions, tokens.shape[-1]))
        x = tokens.astype(self.dtype) + positions[: tokens.shape[1]].astype(self.dtype)
        encoder = Transformer(
            self.layers, self.heads, self.activation, self.dtype, self.remat, name="encoder"
        )
        first = LayerNorm(name="ln_pool")(encoder(x, mask))[:, 0].astype(jnp.float32)
        pooled = ACTIVATIONS["quick_gelu"](nn.Dense(first.shape[-1], name="pool")(first))
        scores = nn.Dense(1, name="score")(pooled)
        return scores.reshape(len(text.mask), len(video.mask))


class FusionTransformer(nn.Module):
    """Our reading of Table 14 and Fig. 6, which the paper draws but does not specify.

    A pre-norm Transformer over a pair's sentence, word, video and frame vectors, told apart by a
    learned vector a kind; a linear layer takes the sentence's output to the score. T x V.
    `competition` says which words and frames are seen.
    """

    layers: int
    heads: int
    activation: str = "quick_gelu"
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, text, video, competition):
        dim = text.sentence.shape[-1]
        kinds = self.param("kinds", nn.initializers.normal(dim**-0.5), (4, dim))
        tokens, mask = _pairs(
            [text.sentence[:, None] + kinds[0], text.words + kinds[1]],
            [video.video[:, None] + kinds[2], video.frames + kinds[3]],
            competition.words(text.mask),
            competition.frames(video.mask),
        )
        encoder = Transformer(
            self.layers, self.heads, self.activation, self.dtype, self.remat, name="encoder"
        )
        first = LayerNorm(name="ln")(encoder(tokens.astype(self.dtype), mask))[:, 0]
        scores = nn.Dense(1, name="score")(first.astype(jnp.float32))
        return scores.reshape(len(text.mask), len(video.mask))


def _pairs(of_texts, of_videos, words_TxW, frames_VxF):
    """Every text's vectors followed by every video's: (TV x L x D, mask TV x 1 x 1 x L).

    The first part of each side is always seen, the masks say which of the rest.
    """
    texts, videos = len(of_texts[0]), len(of_videos[0])
    of_texts, of_videos = jnp.concatenate(of_texts, 1), jnp.concatenate(of_videos, 1)

    def seen(mask, length, count):
        mask = jnp.ones((count, 0), bool) if mask is None else mask
        return jnp.pad(mask, ((0, 0), (length - mask.shape[1], 0)), constant_values=True)

    def pair(a, b):
        shape = (texts, videos)
        a = jnp.broadcast_to(a[:, None], (*shape, *a.shape[1:]))
        b = jnp.broadcast_to(b[None], (*shape, *b.shape[1:]))
        return jnp.concatenate([a, b], 2).reshape(texts * videos, -1, *a.shape[3:])

    mask = pair(
        seen(words_TxW, of_texts.shape[1], texts), seen(frames_VxF, of_videos.shape[1], videos)
    )
    return pair(of_texts, of_videos), mask[:, None, None, :]
