"""The contrastive loss of X-CLIP (https://arxiv.org/abs/2207.07285, Eq. 15-17) and its gradient.

Alternatives and additions of later papers: a sigmoid loss, a loss of each granularity, CDCR.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from xclip_jax.models import XClip
from xclip_jax.ring import compare_in_blocks, compare_in_ring
from xclip_jax.sharding import AXES, constrain, replicated
from xclip_jax.similarity import (
    AnyArray,
    FrameMask,
    TextFeatures,
    TextMask,
    VideoFeatures,
    compute_weights,
)

LOSS_SCALES = {"paper": 1.0, "official": 0.5}  # of Eq. 17, by preset
BLOCK_CELLS = 1 << 26  # word-frame cells a device holds at once: 256 MiB per tensor
Batch = dict[str, AnyArray]
# Sentences, words and their weights, videos, frames and their weights: without masks.
Features = tuple[Array, Array, Array | None, Array, Array, Array | None]
CDCR_SCALE = 1e-3  # of CDCR, as in DRL
# Parameters that compare features, besides the logit scale.
PAIR_PARAMS = ("aggregation_matrices", "log_tau", "logit_bias", "pair_encoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Options of the loss and of its computation."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    each_granularity: bool = False  # mean of the granularities' losses, not loss of their mean
    cdcr: float = 0.0  # weight of channel decorrelation; 0: without
    # ignore: two captions of one video are left out of each other's denominator
    same_video: Literal["negative", "ignore"] = "negative"
    scale: float = 1.0  # factor of Eq. 17
    # Pairs encoded at once, over all devices (gradient caching, Gao et al., 2021,
    # https://arxiv.org/abs/2101.06983); 0: all.
    micro_batch: int = 0
    block_cells: int = 0  # word-frame cells a device holds at once; 0: BLOCK_CELLS
    mesh: Mesh | None = None  # the device mesh; None: one device


def contrastive_loss(
    sim_TxV: Float[AnyArray, "B B"], video_B: Int[AnyArray, " B"] | None = None, scale: float = 1.0
) -> Float[Array, ""]:
    """Returns the symmetric InfoNCE loss of matching pairs: scale x (L_v2t + L_t2v), Eq. 17.

    Args:
        sim_TxV: logits; text i belongs to video i.
        video_B: the video of each pair; two captions of one video are left out of each other's
            denominator. None: they count as negatives, as in the paper.
        scale: 1 in the paper, 0.5 in the PyTorch release.
    """
    targets = jnp.arange(len(sim_TxV))
    if video_B is not None:
        sim_TxV = jnp.where(_same_video(video_B), -1e9, sim_TxV)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    video_to_text = cross_entropy(sim_TxV.T, targets).mean()  # Eq. 15
    text_to_video = cross_entropy(sim_TxV, targets).mean()  # Eq. 16
    return scale * (video_to_text + text_to_video)


def sigmoid_loss(
    sim_TxV: Float[AnyArray, "B B"], video_B: Int[AnyArray, " B"] | None = None, scale: float = 1.0
) -> Float[Array, ""]:
    """Returns the sigmoid loss: scale / B x -sum_ij log sigmoid(z_ij s_ij).

    s are logits with their offset, z is 1 for matching pairs and -1 for all others: SigLIP (Zhai et
    al., 2023, https://arxiv.org/abs/2303.15343, Algorithm 1). Arguments as in `contrastive_loss`;
    two captions of one video are left out.
    """
    matching = jnp.eye(len(sim_TxV))
    loss_BxB = optax.sigmoid_binary_cross_entropy(sim_TxV, matching)
    if video_B is not None:
        loss_BxB = jnp.where(_same_video(video_B), 0, loss_BxB)
    return scale * jnp.sum(loss_BxB) / len(sim_TxV)


def _same_video(video_B: AnyArray) -> Array:
    """Returns the mask, B x B, of two different captions of one video."""
    return (video_B[:, None] == video_B[None]) & ~jnp.eye(len(video_B), dtype=bool)


def channel_decorrelation(
    text: TextFeatures, video: VideoFeatures, words_BxW: TextMask, frames_BxF: FrameMask
) -> Float[Array, ""]:
    """Returns CDCR: sum_i (1 - C_ii)^2 over the D channels of matched (word, frame) pairs.

    Each word of a text is matched with the most similar frame of its video. C_ii is the correlation
    of channel i between words and frames over all pairs of the batch, weighted by the words'
    weights in WTI, or equally within a text. DRL (https://arxiv.org/abs/2203.07111, Sec. 3.3),
    without its off-diagonal term, whose weight is 0 there.

    Args:
        text, video: B texts and their B videos.
        words_BxW, frames_BxF: True = takes part.
    """
    words_BxWxD, frames_BxFxD = (jnp.asarray(x, jnp.float32) for x in (text.words, video.frames))
    highest = jax.lax.Precision.HIGHEST
    scores_BxWxF = jnp.einsum("bwd,bfd->bwf", words_BxWxD, frames_BxFxD, precision=highest)
    best_BxW = jnp.argmax(jnp.where(frames_BxF[:, None], scores_BxWxF, -jnp.inf), 2)
    matched_BxWxD = jnp.take_along_axis(frames_BxFxD, best_BxW[..., None], 1)
    equal_BxW = jnp.zeros(words_BxW.shape)
    logits_BxW = equal_BxW if text.weights is None else jnp.asarray(text.weights)
    share_BxWx1 = compute_weights(logits_BxW, words_BxW, 1)[..., None]
    share_BxWx1 = share_BxWx1 / jnp.maximum(jnp.sum(share_BxWx1), 1)

    def mean(x: Array) -> Array:
        return jnp.sum(share_BxWx1 * x, (0, 1))

    def standardize(x: Array) -> Array:
        x = x - mean(x)
        return x * jax.lax.rsqrt(mean(x**2) + 1e-12)

    correlation_D = mean(standardize(words_BxWxD) * standardize(matched_BxWxD))
    return jnp.sum((1 - correlation_D) ** 2)


def loss_and_grad(
    model: XClip,
    params: Any,
    batch: Batch,
    options: LossOptions = LossOptions(),
    dropout_key: Array | None = None,
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], Any]:
    """Returns ((loss, accuracy), gradient) of a batch, see `loss_of_features`.

    `batch` is one of `xclip_jax.data.pipeline.training_batches`; its leading axes may be split over
    devices. Without a key nothing is dropped out.
    """
    mesh, micro_batch = options.mesh, options.micro_batch
    params = constrain(params, mesh and replicated(mesh))
    inputs = {name: batch[name] for name in ("ids", "text_mask", "frames", "frame_mask")}
    encode = functools.partial(encode_batch, model)

    def compare(params: Any, features: Features) -> tuple[Array, Array]:
        return loss_of_features(model, params, features, batch, options, dropout_key=dropout_key)

    if micro_batch in (0, len(batch["ids"])):
        return jax.value_and_grad(lambda p: compare(p, encode(p, inputs)), has_aux=True)(params)

    # Gradient caching: encode all, differentiate the loss by the features, then encode each part
    # again and pull the gradients of its features back to the parameters.
    parts = jax.tree.map(lambda x: _split(x, micro_batch, mesh), inputs)
    parts_of_features = jax.lax.map(functools.partial(encode, params), parts)
    features = jax.tree.map(lambda x: _join(x, mesh), parts_of_features)
    differentiate = jax.value_and_grad(compare, argnums=(0, 1), has_aux=True)
    result, (by_params, by_features) = differentiate(params, features)

    cotangents = jax.tree.map(lambda x: _split(x, micro_batch, mesh), by_features)
    by_encoders = _pull_back(encode, params, (parts, cotangents), mesh)
    return result, jax.tree.map(jnp.add, by_params, by_encoders)


def _pull_back(
    encode: Callable[[Any, Batch], Features],
    params: Any,
    parts: tuple[Batch, Features],
    mesh: Mesh | None,
) -> Any:
    """Returns the gradient of the parameters by the cotangents of the features of all parts.

    Each device adds up the gradients of its own pairs, and the devices' sums are reduced once.
    """

    def add_parts(params: Any, parts: tuple[Batch, Features]) -> Any:
        def add_part(total: Any, part: tuple[Batch, Features]) -> tuple[Any, None]:
            inputs, cotangents = part
            _, pull_back = jax.vjp(lambda p: encode(p, inputs), params)
            return jax.tree.map(jnp.add, total, pull_back(cotangents)[0]), None

        total = jax.lax.scan(add_part, jax.tree.map(jnp.zeros_like, params), parts)[0]
        return jax.tree.map(lambda x: x[None], total)  # a row for each device

    if mesh is None:
        return jax.tree.map(lambda x: x[0], add_parts(params, parts))
    specs = PartitionSpec(), PartitionSpec(None, AXES)
    options: Any = {"in_specs": specs, "out_specs": PartitionSpec(AXES), "check_vma": False}
    rows = jax.shard_map(add_parts, mesh=mesh, **options)(params, parts)
    return jax.tree.map(lambda x: jnp.sum(x, 0), rows)


def encode_batch(model: XClip, params: Any, batch: Batch) -> Features:
    """Returns the features of a batch that have a gradient."""
    apply: Any = functools.partial(model.apply, {"params": params})
    text = apply(batch["ids"], batch["text_mask"], method="encode_text")
    video = apply(batch["frames"], batch["frame_mask"], method="encode_video")
    return text.sentence, text.words, text.weights, video.video, video.frames, video.weights


def loss_of_features(
    model: XClip,
    params: Any,
    features: Features,
    batch: Batch,
    options: LossOptions,
    *,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (loss, accuracy) of encoded pairs, the output of `encode_batch`.

    Accuracy is the fraction of texts whose most similar video in the batch is their own.
    """
    sentence, words, word_weights, videos, frames, frame_weights = features
    text = TextFeatures(sentence, words, batch["text_mask"], word_weights)
    video = VideoFeatures(videos, frames, batch["frame_mask"], frame_weights)
    keyword = {"options": options, "dropout_key": dropout_key}
    sim_GxTxV = _similarities(model, params, text, video, **keyword)
    video_B = batch["video"] if options.same_video == "ignore" else None
    if options.kind == "sigmoid":
        losses_G = [sigmoid_loss(sim, video_B, options.scale) for sim in sim_GxTxV]
    else:
        losses_G = [contrastive_loss(sim, video_B, options.scale) for sim in sim_GxTxV]
    loss = jnp.mean(jnp.stack(losses_G))
    if options.cdcr:
        masks = model.aosm_words(text.mask), model.aosm_frames(video.mask)
        loss += CDCR_SCALE * options.cdcr * channel_decorrelation(text, video, *masks)
    best_T = jnp.argmax(jnp.mean(sim_GxTxV, 0), 1)
    return loss, jnp.mean(batch["video"][best_T] == batch["video"])


def _similarities(
    model: XClip,
    params: Any,
    text: TextFeatures,
    video: VideoFeatures,
    *,
    options: LossOptions,
    dropout_key: Array | None,
) -> Float[Array, "G T V"]:
    """Returns the logits of all pairs, of each granularity or (G = 1) of their mean.

    If a device cannot hold its part of the word-frame scores, they are computed in blocks: by one
    device one after the other, by several in a ring.
    """
    mesh = options.mesh
    method = _each_granularity if options.each_granularity else _mean_granularity

    def compare(params: Any, text: TextFeatures, video: VideoFeatures, key: Array | None) -> Any:
        rngs = {} if key is None else {"dropout": key}
        return model.apply({"params": params}, text, video, method=method, rngs=rngs)

    num_texts, num_words = text.mask.shape
    num_videos, num_frames = video.mask.shape
    devices = mesh.size if mesh else 1
    cells_per_text = model.config.cells_per_pair(num_words, num_frames) * num_videos // devices
    limit = max(1, (options.block_cells or BLOCK_CELLS) // cells_per_text)  # texts at once
    in_blocks = functools.partial(compare_in_blocks, compare, limit)
    if mesh and devices > 1 and limit < num_texts:
        clip = {"logit_scale": params["clip"]["logit_scale"]}
        used = {name: params[name] for name in PAIR_PARAMS if name in params} | {"clip": clip}
        return compare_in_ring(in_blocks, mesh, (used, text, video, dropout_key))
    return in_blocks(params, text, video, dropout_key)


def _mean_granularity(model: XClip, text: TextFeatures, video: VideoFeatures) -> Array:
    return model.similarity(text, video)[None]


def _each_granularity(model: XClip, text: TextFeatures, video: VideoFeatures) -> Array:
    return jnp.stack(list(model.granular_similarity(text, video).values()))


def _split(x: Array, micro_batch: int, mesh: Mesh | None) -> Array:
    """Reshapes B x ... to micro-batches x pairs x ..., splitting each device's shard locally."""
    count, devices = len(x) // micro_batch, mesh.size if mesh else 1
    x = x.reshape(devices, count, -1, *x.shape[1:]).swapaxes(0, 1)
    return _split_over_devices(x.reshape(count, micro_batch, *x.shape[3:]), 1, mesh)


def _join(x: Array, mesh: Mesh | None) -> Array:
    """Inverts `_split`."""
    x = x.reshape(len(x), mesh.size if mesh else 1, -1, *x.shape[2:]).swapaxes(0, 1)
    return _split_over_devices(x.reshape(-1, *x.shape[3:]), 0, mesh)


def _split_over_devices(x: Array, axis: int, mesh: Mesh | None) -> Array:
    return constrain(x, mesh and NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES)))
