"""The four granularities of contrast and Attention Over Similarity Matrix (AOSM).

Equations are those of X-CLIP, Ma et al., ACM MM 2022, https://arxiv.org/abs/2207.07285.
Rows are texts, columns are videos. Word-frame scores are laid out W x T x F x V: softmax and sums
then run over outer axes while the innermost, the videos, stays contiguous, which is what vector
units want (twice as fast on CPU as T x V x W x F).
"""

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

    Written out over the axis because XLA then makes one vectorised loop of it: on CPU five times as
    fast as reductions. Where everything is masked the result is 0, and so is its gradient.
    """
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


def aggregate(scores, mask, axis, operation, tau):
    """Takes scores to one number along `axis`, over the places where `mask` (broadcast) is True.

    `attention` is AOSM; `max` and `mean` are its rivals in Table 7. All masked: 0, gradient 0.
    """
    if operation == "attention":
        return attend(scores, mask, axis, tau)
    if operation == "max":
        top = jnp.max(jnp.where(mask, scores, _MASKED), axis)
        return jnp.where(jnp.any(mask, axis), top, 0)
    count = jnp.sum(mask, axis)
    return jnp.sum(jnp.where(mask, scores, 0), axis) / jnp.maximum(count, 1)


def aggregate_matrix(scores_WxTxFxV, words_WxT, frames_FxV, aggregation, tau):
    """AOSM of the word-frame matrices (Eq. 9-13): both orders of reduction, averaged. T x V."""
    outer, inner = AGGREGATIONS[aggregation]
    words = words_WxT[:, :, None, None]
    frames = frames_FxV[None, None]
    by_word_WxTxV = aggregate(scores_WxTxFxV, frames, 2, inner, tau)  # Eq. 9
    by_frame_TxFxV = aggregate(scores_WxTxFxV, words, 0, inner, tau)  # Eq. 10
    over_words_TxV = aggregate(by_word_WxTxV, words[:, :, 0], 0, outer, tau)  # Eq. 11
    over_frames_TxV = aggregate(by_frame_TxFxV, frames[0], 1, outer, tau)  # Eq. 12
    return (over_words_TxV + over_frames_TxV) / 2  # Eq. 13


def granular_similarity(
    text, video, granularities=GRANULARITIES, aggregation="attention", tau=0.01
):
    """Cosine similarities of every text with every video at the asked granularities.

    Words are word tokens only, frames real frames only. A vector of scores takes the outer
    operation of `aggregation` (the paper's Table 7 leaves this open). What is not asked for is not
    computed.

    Args:
        text: TextFeatures of T texts.
        video: VideoFeatures of V videos.
        granularities: names out of GRANULARITIES.
        aggregation: a key of AGGREGATIONS.
        tau: temperature of the attention, > 0.

    Returns:
        dict of name -> T x V float32 in [-1, 1].
    """
    words_WxT, frames_FxV = word_mask(text.mask).T, video.mask.T
    outer, _ = AGGREGATIONS[aggregation]

    def video_sentence():  # Eq. 3
        return _dot("td,vd->tv", text.sentence, video.video)

    def video_word():  # Eq. 4, 8
        scores_WxTxV = _dot("twd,vd->wtv", text.words, video.video)
        return aggregate(scores_WxTxV, words_WxT[:, :, None], 0, outer, tau)

    def frame_sentence():  # Eq. 5, 8
        scores_TxFxV = _dot("td,vfd->tfv", text.sentence, video.frames)
        return aggregate(scores_TxFxV, frames_FxV[None], 1, outer, tau)

    def frame_word():  # Eq. 6, 9-13
        scores_WxTxFxV = _dot("twd,vfd->wtfv", text.words, video.frames)
        return aggregate_matrix(scores_WxTxFxV, words_WxT, frames_FxV, aggregation, tau)

    functions = (video_sentence, video_word, frame_sentence, frame_word)
    computed = dict(zip(GRANULARITIES, functions, strict=True))
    return {name: computed[name]() for name in GRANULARITIES if name in granularities}


def fuse(similarities):
    """Eq. 14: the mean of the enabled granularities, T x V."""
    return sum(similarities.values()) / len(similarities)


def word_frame_attention(words_WxD, frames_FxD, words_W, frames_F, tau=0.01):
    """The share of AOSM's attention that each word-frame cell of one pair gets.

    The weights with which Eq. 9-13 add up the cells of the word-frame matrix, so that the sum of
    weights x scores is the pair's word-frame similarity.

    Args:
        words_WxD, frames_FxD: normalised features of one text and one video.
        words_W, frames_F: bool masks, True = a word token, a real frame.
        tau: temperature.

    Returns:
        W x F weights in [0, 1] that sum to 1.
    """
    scores_WxF = _dot("wd,fd->wf", words_WxD, frames_FxD)
    words, frames = words_W[:, None], frames_F[None]
    in_word_WxF = attention_weights(scores_WxF, frames, 1, tau)
    in_frame_WxF = attention_weights(scores_WxF, words, 0, tau)
    by_word_Wx1 = jnp.sum(in_word_WxF * scores_WxF, 1, keepdims=True)
    by_frame_1xF = jnp.sum(in_frame_WxF * scores_WxF, 0, keepdims=True)
    over_words_WxF = attention_weights(by_word_Wx1, words, 0, tau) * in_word_WxF
    over_frames_WxF = attention_weights(by_frame_1xF, frames, 1, tau) * in_frame_WxF
    return (over_words_WxF + over_frames_WxF) / 2


def _dot(equation, a, b):
    """Inner products in full float32, whatever the compute type of the towers."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)
