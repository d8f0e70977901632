"""The four granularities of contrast and Attention Over Similarity Matrix (AOSM).

Equations are those of X-CLIP, Ma et al., ACM MM 2022, https://arxiv.org/abs/2207.07285.
Rows are texts, columns are videos. Word-frame scores are laid out W x T x F x V: softmax and sums
then run over outer axes while the innermost, the videos, stays contiguous, which is what vector
units want (twice as fast on CPU as T x V x W x F).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct

GRANULARITIES = ("video_sentence", "video_word", "frame_sentence", "frame_word")
# Table 7, named outer-inner: the inner operation takes the matrix to a vector, the outer one the
# vector to a scalar.
AGGREGATIONS = {
    "attention": ("attention", "attention"),
    "max-max": ("max", "max"),
    "mean-mean": ("mean", "mean"),
    "mean-max": ("mean", "max"),
    "max-mean": ("max", "mean"),
}
_MASKED = -1e9  # below every cosine; finite, so that a fully masked row stays finite


@struct.dataclass
class TextFeatures:
    """Features of T texts, L2-normalised.

    Attributes:
        sentence: T x D.
        words: T x W x D, one vector a position; padding included.
        mask: T x W bool, True from the start token to the end token, both included.
    """

    sentence: jax.Array
    words: jax.Array
    mask: jax.Array


@struct.dataclass
class VideoFeatures:
    """Features of V videos, L2-normalised.

    Attributes:
        video: V x D.
        frames: V x F x D.
        mask: V x F bool, True = a real frame.
    """

    video: jax.Array
    frames: jax.Array
    mask: jax.Array


@dataclasses.dataclass(frozen=True)
class Competition:
    """What takes part in AOSM.

    Attributes:
        special_tokens: whether the start and end tokens count as words.
        padding: whether padded words and frames compete like real ones.
    """

    special_tokens: bool = False
    padding: bool = False

    def words(self, mask_TxW):
        """T x W bool, True = takes part."""
        words_TxW = mask_TxW if self.special_tokens else word_mask(mask_TxW)
        return words_TxW | ~mask_TxW if self.padding else words_TxW

    def frames(self, mask_VxF):
        """V x F bool, True = takes part."""
        return jnp.ones_like(mask_VxF) if self.padding else mask_VxF


def word_mask(mask_TxW):
    """Mask of the word tokens alone: the text mask without its start and end tokens (Sec. 3.1)."""
    has_successor = jnp.roll(mask_TxW, -1, axis=1).at[:, -1].set(False)
    return (mask_TxW & has_successor).at[:, 0].set(False)


def attention_weights(scores, mask, axis, tau):
    """Eq. 7, softmax(scores / tau) along `axis` over the places where `mask` is True; else 0."""
    scores = jnp.where(mask, scores, _MASKED)
    exps = jnp.exp((scores - jnp.max(scores, axis, keepdims=True)) / tau)
    exps = jnp.where(mask, exps, 0)
    total = jnp.sum(exps, axis, keepdims=True)
    return exps / jnp.where(total > 0, total, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend(scores, mask, axis, tau):
    """AOSM of a vector, sum_i softmax(s / tau)_i s_i (Eq. 7, 8), along `axis`.

    Where everything is masked the result is 0, and so is its gradient.
    """

    def reduced(scores, mask):
        return jnp.sum(attention_weights(scores, mask, axis, tau) * scores, axis)

    written_out = functools.partial(_attend_written_out, axis=axis, tau=tau)
    return jax.lax.platform_dependent(scores, mask, cpu=written_out, default=reduced)


def _attend_written_out(scores, mask, axis, tau):
    """`attend`, a term for each place: XLA makes one vectorised loop of it, on CPU five times as
    fast as reductions. Other compilers would take minutes over it."""
    cells = list(zip(jnp.unstack(scores, axis=axis), jnp.unstack(mask, axis=axis), strict=True))
    peak = functools.reduce(jnp.maximum, [jnp.where(real, s, _MASKED) for s, real in cells])
    total = weighted = 0.0
    for s, real in cells:
        exps = jnp.where(real, jnp.exp((s - peak) / tau), 0)
        total, weighted = total + exps, weighted + exps * s
    return weighted / jnp.where(total > 0, total, 1)


def _attend_forward(scores, mask, axis, tau):
    result = attend(scores, mask, axis, tau)
    return result, (scores, mask, result)


def _attend_backward(axis, tau, residuals, gradient):
    """With p = softmax(s / tau) and y = sum_i p_i s_i: dy / ds_i = p_i (1 + (s_i - y) / tau)."""
    scores, mask, result = residuals
    slope = 1 + (scores - jnp.expand_dims(result, axis)) / tau
    weights = attention_weights(scores, mask, axis, tau)
    return jnp.expand_dims(gradient, axis) * weights * slope, None


attend.defvjp(_attend_forward, _attend_backward)


def mixed_weights(scores, mask, axis, tau, matrix):
    """The attention weights times a learned matrix along `axis`, as the PyTorch release has it."""
    weights = attention_weights(scores, mask, axis, tau)
    if matrix is None:
        return weights
    mixed = jnp.tensordot(weights, matrix, (axis, 0), precision=jax.lax.Precision.HIGHEST)
    return jnp.where(mask, jnp.moveaxis(mixed, -1, axis), 0)


def aggregate(scores, mask, axis, operation, tau, matrix=None):
    """Takes scores to one number along `axis`, over the places where `mask` (broadcast) is True.

    `attention` is AOSM; `max` and `mean` are its rivals in Table 7. All masked: 0, gradient 0.
    `matrix`: optional learned n x n that the attention's weights pass through.
    """
    if operation == "attention" and matrix is not None:
        return jnp.sum(mixed_weights(scores, mask, axis, tau, matrix) * scores, axis)
    if operation == "attention":
        return attend(scores, mask, axis, tau)
    if operation == "max":
        top = jnp.max(jnp.where(mask, scores, _MASKED), axis)
        return jnp.where(jnp.any(mask, axis), top, 0)
    count = jnp.sum(mask, axis)
    return jnp.sum(jnp.where(mask, scores, 0), axis) / jnp.maximum(count, 1)


def aggregate_matrix(scores_WxTxFxV, words_WxT, frames_FxV, aggregation, tau, matrices=None):
    """AOSM of the word-frame matrices (Eq. 9-13): both orders of reduction, averaged. T x V."""
    outer, inner = AGGREGATIONS[aggregation]
    words = words_WxT[:, :, None, None]
    frames = frames_FxV[None, None]
    learned = (matrices or {}).get
    by_word_WxTxV = aggregate(  # Eq. 9
        scores_WxTxFxV, frames, 2, inner, tau, learned("frame_word_frames")
    )
    by_frame_TxFxV = aggregate(  # Eq. 10
        scores_WxTxFxV, words, 0, inner, tau, learned("frame_word_words")
    )
    over_words_TxV = aggregate(  # Eq. 11
        by_word_WxTxV, words[:, :, 0], 0, outer, tau, learned("frame_word_words_2")
    )
    over_frames_TxV = aggregate(  # Eq. 12
        by_frame_TxFxV, frames[0], 1, outer, tau, learned("frame_word_frames_2")
    )
    return (over_words_TxV + over_frames_TxV) / 2  # Eq. 13


def granular_similarity(
    text,
    video,
    granularities=GRANULARITIES,
    aggregation="attention",
    tau=0.01,
    competition=Competition(),
    matrices=None,
):
    """Similarities of every text with every video at the asked granularities.

    A vector of scores takes the outer operation of `aggregation` (the paper's Table 7 leaves this
    open). What is not asked for is not computed.

    Args:
        text: TextFeatures of T texts.
        video: VideoFeatures of V videos.
        granularities: names out of GRANULARITIES.
        aggregation: a key of AGGREGATIONS.
        tau: temperature of the attention, > 0.
        competition: what counts as a word and a frame; default: word tokens and real frames.
        matrices: the release's learned matrices, see xclip_jax.models.heads.AggregationMatrices.

    Returns:
        dict of name -> T x V float32; cosines, in [-1, 1], where there are no learned matrices.
    """
    words_WxT, frames_FxV = competition.words(text.mask).T, competition.frames(video.mask).T
    outer, _ = AGGREGATIONS[aggregation]
    matrices = matrices or {}

    def learned(name, x):  # x times a D x D matrix
        return x if name not in matrices else _dot("...d,de->...e", x, matrices[name])

    def video_sentence():  # Eq. 3
        return _dot("td,vd->tv", learned("video_sentence", text.sentence), video.video)

    def video_word():  # Eq. 4, 8
        scores_WxTxV = _dot("twd,vd->wtv", text.words, video.video)
        mask, matrix = words_WxT[:, :, None], matrices.get("video_word")
        return aggregate(scores_WxTxV, mask, 0, outer, tau, matrix)

    def frame_sentence():  # Eq. 5, 8
        scores_TxFxV = _dot("td,vfd->tfv", text.sentence, video.frames)
        mask, matrix = frames_FxV[None], matrices.get("frame_sentence")
        return aggregate(scores_TxFxV, mask, 1, outer, tau, matrix)

    def frame_word():  # Eq. 6, 9-13
        scores_WxTxFxV = _dot("twd,vfd->wtfv", learned("frame_word", text.words), video.frames)
        return aggregate_matrix(scores_WxTxFxV, words_WxT, frames_FxV, aggregation, tau, matrices)

    functions = (video_sentence, video_word, frame_sentence, frame_word)
    computed = dict(zip(GRANULARITIES, functions, strict=True))
    return {name: computed[name]() for name in GRANULARITIES if name in granularities}


def fuse(similarities):
    """Eq. 14: the mean of the enabled granularities, T x V."""
    return sum(similarities.values()) / len(similarities)


def word_frame_attention(words_WxD, frames_FxD, words_W, frames_F, tau=0.01, matrices=None):
    """The share of AOSM's attention that each word-frame cell of one pair gets.

    The weights with which Eq. 9-13 add up the cells of the word-frame matrix, so that the sum of
    weights x scores is the pair's word-frame similarity.

    Args:
        words_WxD, frames_FxD: normalised features of one text and one video.
        words_W, frames_F: bool masks, True = takes part.
        tau: temperature.
        matrices: the release's learned matrices, if the model has them.

    Returns:
        W x F weights; in [0, 1] and summing to 1 where there are no learned matrices.
    """
    learned = (matrices or {}).get
    if learned("frame_word") is not None:
        words_WxD = _dot("wd,de->we", words_WxD, learned("frame_word"))
    scores_WxF = _dot("wd,fd->wf", words_WxD, frames_FxD)
    words, frames = words_W[:, None], frames_F[None]
    in_word_WxF = mixed_weights(scores_WxF, frames, 1, tau, learned("frame_word_frames"))
    in_frame_WxF = mixed_weights(scores_WxF, words, 0, tau, learned("frame_word_words"))
    by_word_Wx1 = jnp.sum(in_word_WxF * scores_WxF, 1, keepdims=True)
    by_frame_1xF = jnp.sum(in_frame_WxF * scores_WxF, 0, keepdims=True)
    over_words_Wx1 = mixed_weights(by_word_Wx1, words, 0, tau, learned("frame_word_words_2"))
    over_frames_1xF = mixed_weights(by_frame_1xF, frames, 1, tau, learned("frame_word_frames_2"))
    return (over_words_Wx1 * in_word_WxF + over_frames_1xF * in_frame_WxF) / 2


def _dot(equation, a, b):
    """Inner products in full float32, whatever the compute type of the towers."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)
