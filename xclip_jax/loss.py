"""The contrastive loss of X-CLIP (https://arxiv.org/abs/2207.07285, Eq. 15-17) and its gradient."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from xclip_jax.models import XClip
from xclip_jax.sharding import AXES, constrain, replicated
from xclip_jax.similarity import AnyArray, TextFeatures, VideoFeatures

LOSS_SCALES = {"paper": 1.0, "official": 0.5}  # of Eq. 17, by preset
BLOCK_CELLS = 1 << 26  # word-frame cells a device holds at once: 256 MiB per tensor
Batch = dict[str, AnyArray]
Features = tuple[Array, Array, Array, Array]  # sentences, words, videos, frames


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Options of the loss and of its computation."""

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
        same = (video_B[:, None] == video_B[None]) & ~jnp.eye(len(video_B), dtype=bool)
        sim_TxV = jnp.where(same, -1e9, sim_TxV)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    video_to_text = cross_entropy(sim_TxV.T, targets).mean()  # Eq. 15
    text_to_video = cross_entropy(sim_TxV, targets).mean()  # Eq. 16
    return scale * (video_to_text + text_to_video)


def loss_and_grad(
    model: XClip, params: Any, batch: Batch, options: LossOptions = LossOptions()
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], Any]:
    """Returns ((loss, accuracy), gradient) of a batch, see `loss_of_features`.

    `batch` is one of `xclip_jax.data.pipeline.training_batches`; its leading axes may be split over
    devices.
    """
    mesh, micro_batch = options.mesh, options.micro_batch
    params = constrain(params, mesh and replicated(mesh))
    inputs = {name: batch[name] for name in ("ids", "text_mask", "frames", "frame_mask")}
    encode = functools.partial(encode_batch, model)

    def compare(params: Any, features: Features) -> tuple[Array, Array]:
        return loss_of_features(model, params, features, batch, options)

    if micro_batch in (0, len(batch["ids"])):
        return jax.value_and_grad(lambda p: compare(p, encode(p, inputs)), has_aux=True)(params)

    # Gradient caching: encode all, differentiate the loss by the features, then encode each part
    # again and pull the gradients of its features back to the parameters.
    parts = jax.tree.map(lambda x: _split(x, micro_batch, mesh), inputs)
    parts_of_features = jax.lax.map(functools.partial(encode, params), parts)
    features = jax.tree.map(lambda x: _join(x, mesh), parts_of_features)
    differentiate = jax.value_and_grad(compare, argnums=(0, 1), has_aux=True)
    result, (by_params, by_features) = differentiate(params, features)

    def add_part(total: Any, part: tuple[Batch, Features]) -> tuple[Any, None]:
        inputs, cotangents = part
        _, pull_back = jax.vjp(lambda p: encode(p, inputs), params)
        return jax.tree.map(jnp.add, total, pull_back(cotangents)[0]), None

    cotangents = jax.tree.map(lambda x: _split(x, micro_batch, mesh), by_features)
    return result, jax.lax.scan(add_part, by_params, (parts, cotangents))[0]


def encode_batch(model: XClip, params: Any, batch: Batch) -> Features:
    """Returns sentences, words, videos and frames of a batch: the features that have a gradient."""
    apply: Any = functools.partial(model.apply, {"params": params})
    text = apply(batch["ids"], batch["text_mask"], method="encode_text")
    video = apply(batch["frames"], batch["frame_mask"], method="encode_video")
    return text.sentence, text.words, video.video, video.frames


def loss_of_features(
    model: XClip, params: Any, features: Features, batch: Batch, options: LossOptions
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (loss, accuracy) of encoded pairs, the output of `encode_batch`.

    Accuracy is the fraction of texts whose most similar video in the batch is their own.
    """
    mesh = options.mesh
    text = TextFeatures(*features[:2], batch["text_mask"])
    video = VideoFeatures(*features[2:], batch["frame_mask"])
    compare: Any = functools.partial(model.apply, {"params": params}, method="similarity")
    num_texts, num_words = text.mask.shape
    num_videos, num_frames = video.mask.shape
    cells_per_text = model.config.cells_per_pair(num_words, num_frames) * num_videos
    cells_per_text //= mesh.size if mesh else 1  # on each device
    limit = max(1, (options.block_cells or BLOCK_CELLS) // cells_per_text)
    rows = max(n for n in range(1, num_texts + 1) if num_texts % n == 0 and n <= limit)
    if rows == num_texts:
        sim_TxV = compare(text, video)
    else:  # in blocks of texts
        text = constrain(text, mesh and replicated(mesh))
        blocks = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), text)
        compare_block = jax.checkpoint(lambda block: compare(block, video))
        sim_TxV = jax.lax.map(compare_block, blocks).reshape(num_texts, num_videos)
    correct = batch["video"][jnp.argmax(sim_TxV, 1)] == batch["video"]
    video_B = batch["video"] if options.same_video == "ignore" else None
    return contrastive_loss(sim_TxV, video_B, scale=options.scale), jnp.mean(correct)


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
