"""Alternatives and additions to plain AOSM: learned matrices, Transformers over each pair."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xclip_jax.models.config import ModelConfig
from xclip_jax.models.transformer import ACTIVATIONS, LayerNorm, Transformer, normal
from xclip_jax.similarity import AnyArray, FrameMask, Logits, TextFeatures, TextMask, VideoFeatures

TIGHT_DROPOUT = 0.1  # as in CLIP4Clip


class AggregationMatrices(nn.Module):
    """Learned matrices of the PyTorch X-CLIP (not in the paper), initialised to the identity.

    They transform the joint space (D x D) or the attention over words (W x W) and frames (F x F),
    so that a model works for these lengths only. The output is a dict of name -> square matrix.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        c = self.config
        sizes = {"video_sentence": c.embed_dim, "video_word": c.max_words}
        sizes |= {"frame_sentence": c.max_frames, "frame_word": c.embed_dim}
        sizes = {name: size for name, size in sizes.items() if name in c.granularities}
        if "frame_word" in sizes:
            sizes |= {f"frame_word_words{n}": c.max_words for n in ("", "_2")}
            sizes |= {f"frame_word_frames{n}": c.max_frames for n in ("", "_2")}

        # Initialisers are called with a random key first.
        return {name: self.param(name, lambda _, n=n: jnp.eye(n)) for name, n in sizes.items()}


class TokenWeights(nn.Module):
    """Logits of the tokens' weights in WTI: an MLP, D to D to 1, of vectors before normalisation.

    DRL (Wang et al., 2022, https://arxiv.org/abs/2203.07111).
    """

    @nn.compact
    def __call__(self, x_BxLxD: Float[AnyArray, "B L D"]) -> Float[Array, "B L"]:
        hidden = nn.relu(nn.Dense(x_BxLxD.shape[-1], name="hidden")(x_BxLxD))
        return nn.Dense(1, name="score")(hidden)[..., 0]


class PairTransformer(nn.Module):
    """Pre-norm Transformer that scores each pair from its vectors: the tight head or the fusion.

    The tight head of CLIP4Clip (https://arxiv.org/abs/2104.08860) takes the raw sentence and frame
    vectors plus learned positions. The fusion, after Table 14 and Fig. 6 of the paper, which leaves
    details open, takes the sentence, word, video and frame vectors, each plus a learned vector for
    its kind, with the masks of AOSM. The sentence's output is mapped to the score. With a random
    key "dropout", which training passes, the tight head drops out a part of its inputs.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, text: TextFeatures, video: VideoFeatures, words_TxW: TextMask, frames_VxF: FrameMask
    ) -> Logits:
        c, dim = self.config, text.sentence.shape[-1]
        dtype = c.compute_dtype
        if is_tight := c.fusion == "mean":
            no_words = jnp.ones((len(text.mask), 0), bool)
            tokens, mask = _pair([text.sentence[:, None]], no_words, [video.frames], video.mask)
            count = max(c.text.context_length, c.max_frames + 1)  # and the sentence's
            positions = self.param("positions", normal(0.01), (count, dim))
            x = tokens.astype(dtype) + positions[: tokens.shape[1]].astype(dtype)
            x = nn.Dropout(TIGHT_DROPOUT)(x, deterministic=not self.has_rng("dropout"))
        else:
            kinds = self.param("kinds", normal(dim**-0.5), (4, dim))
            texts = [text.sentence[:, None] + kinds[0], text.words + kinds[1]]
            videos = [video.video[:, None] + kinds[2], video.frames + kinds[3]]
            tokens, mask = _pair(texts, words_TxW, videos, frames_VxF)
            x = tokens.astype(dtype)
        options: Any = {"first_only": True, "name": "encoder"}
        x = Transformer(c.blocks("temporal"), dtype, c.remat, **options)(x, mask)
        y = LayerNorm(name="ln_pool" if is_tight else "ln")(x)[:, 0].astype(jnp.float32)
        if is_tight:
            y = ACTIVATIONS["quick_gelu"](nn.Dense(dim, name="pool")(y))
        return nn.Dense(1, name="score")(y).reshape(len(text.mask), len(video.mask))


def _pair(
    texts: list[AnyArray], words_TxW: AnyArray, videos: list[AnyArray], frames_VxF: AnyArray
) -> tuple[Array, Array]:
    """Returns the vectors of each text and each video, TV x L x D, and their attention mask."""

    # The masks cover the last positions of each side; all earlier positions are attended to.
    def extend(mask: AnyArray, x: Array) -> Array:
        return jnp.pad(mask, ((0, 0), (x.shape[1] - mask.shape[1], 0)), constant_values=True)

    def combine(a: Array, b: Array) -> Array:
        pairs = jax.vmap(jax.vmap(lambda a, b: jnp.concatenate([a, b]), (None, 0)), (0, None))
        return jax.lax.collapse(pairs(a, b), 0, 2)

    text, video = jnp.concatenate(texts, 1), jnp.concatenate(videos, 1)
    mask = combine(extend(words_TxW, text), extend(frames_VxF, video))
    return combine(text, video), mask[:, None, None, :]
