"""The four granularities of contrast and Attention Over Similarity Matrix (AOSM).

Equations are those of X-CLIP, Ma et al., ACM MM 2022, https://arxiv.org/abs/2207.07285.
Rows are texts, columns are videos. Word-frame scores are laid out W x T x F x V: softmax and sums
run over outer axes and the innermost, the videos, is contiguous, which is twice as fast on CPU as
T x V x W x F.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from xclip_jax.devices import is_recent_gpu

AnyArray = jax.Array | np.ndarray
TextMask = Bool[AnyArray, "T W"]  # True = a real token; of AOSM: takes part
FrameMask = Bool[AnyArray, "V F"]
Logits = Float[Array, "T V"]
Scores = Float[Array, "..."]
Mask = Bool[AnyArray, "..."]  # broadcastable to the scores, True = takes part
Granularity = Literal["video_sentence", "video_word", "frame_sentence", "frame_word"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
# Table 7, named outer-inner: the inner operation reduces the matrix to a vector, the outer one the
# vector to a scalar. Then, with s the similarity of word w and frame f:
# weighted: WTI of DRL (Wang et al., 2022, https://arxiv.org/abs/2203.07111), with learned weights,
#   (sum_w a_w max_f s + sum_f b_f max_w s) / 2;
# maxsim: the word side of mean-max alone, sum_w max_f s / m for m words, as in Video-ColBERT
#   (Reddy et al., 2025, https://arxiv.org/abs/2503.19009).
Aggregation = Literal[
    "attention", "max-max", "mean-mean", "mean-max", "max-mean", "weighted", "maxsim"
]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
Operation = Literal["attention", "max", "mean", "weighted"]
Tau = float | Float[AnyArray, ""]  # temperature, above 0
Matrix = Float[AnyArray, "N N"]
Matrices = Mapping[str, AnyArray]  # see xclip_jax.models.heads.AggregationMatrices
_MASKED = -1e9  # below every cosine; finite, so that a fully masked row stays finite


@no_type_check  # JAX also builds it from placeholders that are not arrays
@struct.dataclass
class TextFeatures:
    """Features of T texts, L2-normalised except under the `tight_transformer` head."""

    sentence: AnyArray  # T x D
    words: AnyArray  # T x W x D, one vector per position, padding included
    mask: AnyArray  # T x W bool, True from the start token to the end token, both included
    weights: AnyArray | None = None  # T x W logits of the words' weights; None: not `weighted`


@no_type_check
@struct.dataclass
class VideoFeatures:
    """Features of V videos, L2-normalised except under the `tight_transformer` head."""

    video: AnyArray  # V x D
    frames: AnyArray  # V x F x D
    mask: AnyArray  # V x F bool, True = a real frame
    weights: AnyArray | None = None  # V x F logits of the frames' weights; None: not `weighted`


def aosm_words(
    mask_TxW: TextMask,
    *,
    special_tokens: bool = False,
    padding: bool = False,
    start_token: bool = True,
    end_token: bool = True,
) -> TextMask:
    """Returns a mask of the positions that take part in AOSM as words, True = takes part.

    Args:
        mask_TxW: True from the first token to the end token.
        special_tokens: include the start and end tokens; the paper uses words only (Sec. 3.1).
        padding: include padded positions, as the PyTorch release does.
        start_token: texts begin with a start token.
        end_token: texts end with an end token.
    """
    words_TxW = mask_TxW = jnp.asarray(mask_TxW)
    if not special_tokens:
        if end_token:
            words_TxW = mask_TxW & jnp.roll(mask_TxW, -1, axis=1).at[:, -1].set(False)
        words_TxW = words_TxW.at[:, : int(start_token)].set(False)
    return words_TxW | ~mask_TxW if padding else words_TxW


def compute_weights(
    scores: Scores, mask: Mask, axis: int, tau: Tau = 1.0, matrix: Matrix | None = None
) -> Scores:
    """Returns the attention weights softmax(scores / tau) along `axis` (Eq. 7), 0 where masked.

    A learned `matrix` is multiplied with the weights along `axis`, as in the PyTorch release.
    """
    scores = jnp.where(mask, scores, _MASKED)
    exps = jnp.exp((scores - jnp.max(scores, axis, keepdims=True)) / tau)
    exps = jnp.where(mask, exps, 0)
    total = jnp.sum(exps, axis, keepdims=True)
    weights = exps / jnp.where(total > 0, total, 1)
    if matrix is None:
        return weights
    mixed = jnp.tensordot(weights, matrix, (axis, 0), precision=jax.lax.Precision.HIGHEST)
    return jnp.where(mask, jnp.moveaxis(mixed, -1, axis), 0)


# On CPU, automatic differentiation takes 2.7 times as long as the gradient below and twice the
# memory, or minutes to compile if the sum is unrolled.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend(scores: Scores, mask: Mask, axis: int, tau: Tau) -> Scores:
    """Returns sum_i softmax(s / tau)_i s_i (Eq. 7, 8) along `axis`, 0 if all is masked."""

    def reduce(scores: Array, mask: Array) -> Array:
        return jnp.sum(compute_weights(scores, mask, axis, tau) * scores, axis)

    # XLA compiles one term per position to one vectorised loop, which is three times as fast as
    # reductions on CPU. For other devices, compilation would take minutes.
    def unroll(scores: Array, mask: Array) -> Array:
        cells = list(zip(jnp.unstack(scores, axis=axis), jnp.unstack(mask, axis=axis), strict=True))
        peak = functools.reduce(jnp.maximum, [jnp.where(real, s, _MASKED) for s, real in cells])
        total = weighted = 0.0
        for s, real in cells:
            exps = jnp.where(real, jnp.exp((s - peak) / tau), 0)
            total, weighted = total + exps, weighted + exps * s
        return weighted / jnp.where(total > 0, total, 1)

    return jax.lax.platform_dependent(scores, mask, cpu=unroll, default=reduce)


def _attend_forward(scores: Array, mask: Array, axis: int, tau: Tau) -> tuple[Array, Any]:
    result: Any = attend(scores, mask, axis, tau)
    return result, (scores, mask, tau, result)


def _attend_backward(axis: int, residuals: Any, gradient: Array) -> tuple[Array, None, Array]:
    # With p = softmax(s / tau) and y = sum_i p_i s_i: dy / ds_i = p_i (1 + (s_i - y) / tau),
    # dy / dtau = -sum_i p_i (s_i - y)^2 / tau^2.
    scores, mask, tau, result = residuals
    gradient = jnp.expand_dims(gradient, axis) * compute_weights(scores, mask, axis, tau)
    distance = (scores - jnp.expand_dims(result, axis)) / tau
    return gradient * (1 + distance), None, -jnp.sum(gradient * distance**2)


attend.defvjp(_attend_forward, _attend_backward)


def aggregate(
    scores: Scores,
    mask: Mask,
    axis: int,
    operation: Operation,
    *,
    tau: Tau = 1.0,
    matrix: Any = None,
    weights: Scores | None = None,
) -> Scores:
    """Returns scores reduced along `axis`, over the positions where `mask` is True.

    `attention` is AOSM, `max` and `mean` are the alternatives in Table 7, `weighted` is the sum
    with `weights`. Where everything is masked the result and its gradient are 0. `tau` and
    `matrix`: as in `compute_weights`.
    """
    if operation == "weighted":
        if weights is None:
            raise ValueError("aggregation = 'weighted' needs features of a model with weights")
        return jnp.sum(jnp.where(mask, weights * scores, 0), axis)
    if operation == "attention":
        if matrix is None:
            return attend(scores, mask, axis, tau)
        return jnp.sum(compute_weights(scores, mask, axis, tau, matrix) * scores, axis)
    if operation == "max":
        top = jnp.max(jnp.where(mask, scores, _MASKED), axis)
        return jnp.where(jnp.any(mask, axis), top, 0)
    count = jnp.sum(mask, axis)
    return jnp.sum(jnp.where(mask, scores, 0), axis) / jnp.maximum(count, 1)


def split_aggregation(aggregation: Aggregation) -> tuple[Operation, Operation, Operation]:
    """Returns the operations over words, over frames and inside a row or column of the matrix."""
    if aggregation == "weighted":
        return "weighted", "weighted", "max"
    if aggregation == "maxsim":
        return "mean", "max", "max"
    operations: Any = aggregation.split("-")
    return operations[0], operations[0], operations[-1]


def aggregate_matrix(
    scores_WxTxFxV: Float[Array, "W T F V"],
    words_WxT: Bool[Array, " W #T"],
    frames_FxV: Bool[Array, " F #V"],
    *,
    aggregation: Aggregation,
    tau: Tau = 1.0,
    matrices: Matrices | None = None,
    word_weights: Float[Array, "W T 1"] | None = None,
    frame_weights: Float[Array, "1 F V"] | None = None,
) -> Logits:
    """Returns the word-frame similarities (Eq. 9-13): both orders of reduction, averaged.

    `maxsim` has the first order only. `weighted` needs both arrays of weights.
    """
    over_words, over_frames, inner = split_aggregation(aggregation)
    words, frames = words_WxT[:, :, None, None], frames_FxV[None, None]

    def reduce(name: str, *arguments: Any, by: Array | None = None) -> Array:
        matrix = (matrices or {}).get(f"frame_word_{name}")
        return aggregate(*arguments, tau=tau, matrix=matrix, weights=by)

    by_word_WxTxV = reduce("frames", scores_WxTxFxV, frames, 2, inner)  # Eq. 9, 11
    sim_TxV = reduce("words_2", by_word_WxTxV, words[:, :, 0], 0, over_words, by=word_weights)
    if aggregation == "maxsim":
        return sim_TxV
    by_frame_TxFxV = reduce("words", scores_WxTxFxV, words, 0, inner)  # Eq. 10, 12
    other_TxV = reduce("frames_2", by_frame_TxFxV, frames[0], 1, over_frames, by=frame_weights)
    return (sim_TxV + other_TxV) / 2  # Eq. 13


def granular_similarity(
    text: TextFeatures,
    video: VideoFeatures,
    *,
    granularities: tuple[Granularity, ...] = GRANULARITIES,
    aggregation: Aggregation = "attention",
    tau: Tau = 0.01,
    words_TxW: TextMask | None = None,
    frames_VxF: FrameMask | None = None,
    matrices: Matrices | None = None,
) -> dict[Granularity, Logits]:
    """Returns the similarities of T texts with V videos at each of `granularities`.

    A vector of scores is reduced with the operation that `aggregation` has over words or frames:
    the outer one of Table 7, which the paper leaves open, the weighted sum of `weighted`, and with
    `maxsim` the mean over words, the maximum over frames. Granularities that are not listed are not
    computed.

    Args:
        text, video: the features.
        granularities, aggregation, tau: as in ModelConfig.
        words_TxW: words that take part in AOSM; default: the word tokens.
        frames_VxF: frames that take part in AOSM; default: the real frames.
        matrices: the PyTorch release's learned matrices.

    Returns dict of name -> T x V float32; cosines, in [-1, 1], unless there are learned matrices.
    Raises ValueError if `aggregation` is "weighted", and the features have no weights.
    """
    words_WxT = jnp.asarray(aosm_words(text.mask) if words_TxW is None else words_TxW).T
    frames_FxV = jnp.asarray(video.mask if frames_VxF is None else frames_VxF).T
    words, frames = words_WxT[:, :, None], frames_FxV[None]
    a_WxTx1, b_1xFxV = _weigh(text.weights, words, 0), _weigh(video.weights, frames, 1)
    matrices = matrices or {}
    over_words, over_frames, _ = split_aggregation(aggregation)
    sim: dict[Granularity, Array] = {}

    def reduce(name: Granularity, *arguments: Any, weights: Array | None) -> None:
        options = {"tau": tau, "matrix": matrices.get(name), "weights": weights}
        sim[name] = aggregate(*arguments, **options)

    words_WxTxD, frames_DxFxV = _lay_out(text.words, 1, 0, 2), _lay_out(video.frames, 2, 1, 0)
    video_DxV = _lay_out(video.video, 1, 0)
    if "video_sentence" in granularities:  # Eq. 3
        sentence_TxD = _transform(text.sentence, matrices.get("video_sentence"))
        sim["video_sentence"] = _dot("td,dv->tv", sentence_TxD, video_DxV)
    if "video_word" in granularities:  # Eq. 4, 7
        scores_WxTxV = _dot("wtd,dv->wtv", words_WxTxD, video_DxV)
        reduce("video_word", scores_WxTxV, words, 0, over_words, weights=a_WxTx1)
    if "frame_sentence" in granularities:  # Eq. 5, 8
        scores_TxFxV = _dot("td,dfv->tfv", text.sentence, frames_DxFxV)
        reduce("frame_sentence", scores_TxFxV, frames, 1, over_frames, weights=b_1xFxV)
    if "frame_word" in granularities:  # Eq. 6, 9-13
        words_WxTxD = _transform(words_WxTxD, matrices.get("frame_word"))
        cells_WxTxFxV = _dot("wtd,dfv->wtfv", words_WxTxD, frames_DxFxV)
        options = {"aggregation": aggregation, "tau": tau, "matrices": matrices}
        options |= {"word_weights": a_WxTx1, "frame_weights": b_1xFxV}
        sim["frame_word"] = aggregate_matrix(cells_WxTxFxV, words_WxT, frames_FxV, **options)
    return sim


def word_frame_attention(
    words_WxD: Float[AnyArray, "W D"],
    frames_FxD: Float[AnyArray, "F D"],
    words_W: Bool[AnyArray, " W"],
    frames_F: Bool[AnyArray, " F"],
    *,
    tau: Tau = 0.01,
    matrices: Matrices | None = None,
) -> Float[Array, "W F"]:
    """Returns the weight of each word-frame cell of one pair in AOSM (Eq. 9-13).

    The sum of weights x scores is the pair's word-frame similarity. Weights are in [0, 1] and sum
    to 1, unless there are learned matrices. In the masks of words and frames, True = takes part.
    """
    learned = (matrices or {}).get
    words, frames = jnp.asarray(words_W)[:, None], jnp.asarray(frames_F)[None]
    scores_WxF = _dot("wd,fd->wf", _transform(words_WxD, learned("frame_word")), frames_FxD)

    def weigh(scores: Array, mask: Array, axis: int, name: str) -> Array:
        return compute_weights(scores, mask, axis, tau, learned(f"frame_word_{name}"))

    in_word_WxF = weigh(scores_WxF, frames, 1, "frames")
    in_frame_WxF = weigh(scores_WxF, words, 0, "words")
    by_word_Wx1 = jnp.sum(in_word_WxF * scores_WxF, 1, keepdims=True)
    by_frame_1xF = jnp.sum(in_frame_WxF * scores_WxF, 0, keepdims=True)
    over_words_Wx1 = weigh(by_word_Wx1, words, 0, "words_2")
    over_frames_1xF = weigh(by_frame_1xF, frames, 1, "frames_2")
    return (over_words_Wx1 * in_word_WxF + over_frames_1xF * in_frame_WxF) / 2


def _weigh(logits: AnyArray | None, mask: Mask, axis: int) -> Array | None:
    """Returns the weights of words or frames, None if the features have none."""
    if logits is None:
        return None
    return compute_weights(jnp.asarray(logits).T.reshape(mask.shape), mask, axis)


def _lay_out(x: AnyArray, *axes: int) -> Array:
    """Returns x with permuted axes.

    On CPU it is also stored in that order, which the fast product needs.
    """

    def store(x: AnyArray) -> Array:
        return jax.lax.optimization_barrier(jnp.transpose(x, axes))

    return jax.lax.platform_dependent(x, cpu=store, default=lambda x: jnp.transpose(x, axes))


def _transform(x: AnyArray, matrix: AnyArray | None) -> AnyArray:
    return x if matrix is None else _dot("...d,de->...e", x, matrix)


def _dot(equation: str, a: AnyArray, b: AnyArray) -> Array:
    """Returns inner products in float32, whatever the compute type of the towers.

    On a recent GPU they are sums of three products of bfloat16 parts, which differ from those of
    float32 by about 1e-6 for unit vectors.
    """
    in_parts, exact = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3, jax.lax.Precision.HIGHEST
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, precision=in_parts if is_recent_gpu() else exact)
