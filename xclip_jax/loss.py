"""The contrastive loss of X-CLIP (https://arxiv.org/abs/2207.07285, Eq. 15-17)."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xclip_jax.sharding import AXES, constrain, replicated
from xclip_jax.similarity import TextFeatures, VideoFeatures


def contrastive_loss(sim_TxV, video_B=None, scale=1.0):
    """Symmetric InfoNCE over a batch of matching pairs: scale x (L_v2t + L_t2v), Eq. 17.

    Args:
        sim_TxV: B x B logits; text i belongs to video i.
        video_B: optional int[B] naming each pair's video. Two captions of one video are then left
            out of each other's denominator; without it they count as negatives, as in the paper.
        scale: 1 as in the paper; the PyTorch release has 0.5.

    Returns:
        The scalar loss.
    """
    targets = jnp.arange(len(sim_TxV))
    if video_B is not None:
        same = (video_B[:, None] == video_B[None]) & ~jnp.eye(len(video_B), dtype=bool)
        sim_TxV = jnp.where(same, -1e9, sim_TxV)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    video_to_text = cross_entropy(sim_TxV.T, targets).mean()  # Eq. 15
    text_to_video = cross_entropy(sim_TxV, targets).mean()  # Eq. 16
    return scale * (video_to_text + text_to_video)


BLOCK_CELLS = 1 << 26  # word-frame cells a device holds at once: 256 MiB a tensor


@dataclasses.dataclass(frozen=True)
class Contrast:
    """How the loss of a batch is computed.

    Attributes:
        model: the linen module.
        same_video, loss_scale: see losses.py; same_video is "negative" or "ignore".
        micro_batch: pairs the towers see at once, over all devices; 0: all.
        block_cells: word-frame cells a device holds at once; 0: BLOCK_CELLS.
        mesh: the mesh the program runs on; None: one device.
    """

    model: Callable
    same_video: str = "negative"
    loss_scale: float = 1.0
    micro_batch: int = 0
    block_cells: int = 0
    mesh: Mesh | None = None

    def value_and_grad(self, params, batch):
        """((loss, accuracy), gradient) of a batch as data/pipeline.py gives it.

        accuracy: share of texts whose best video in the batch is theirs, in whichever of its pairs.
        """
        params = constrain(params, self.mesh and replicated(self.mesh))
        if self.micro_batch in (0, len(batch["ids"])):
            return jax.value_and_grad(
                lambda p: self._loss(p, self._encode(p, batch), batch), has_aux=True
            )(params)
        return self._cached(params, batch)

    def _cached(self, params, batch):
        """Embeds all, takes the loss on the features, runs the towers again with its gradients."""
        parts = {name: self._split(batch[name]) for name in _INPUTS}
        features = jax.lax.map(functools.partial(self._encode, params), parts)
        (loss, gradients) = jax.value_and_grad(self._loss, argnums=(0, 1), has_aux=True)(
            params, jax.tree.map(self._join, features), batch
        )
        by_params, by_features = gradients

        def add(total, part):
            inputs, cotangents = part
            _, pull_back = jax.vjp(lambda p: self._encode(p, inputs), params)
            return jax.tree.map(jnp.add, total, pull_back(cotangents)[0]), None

        cotangents = jax.tree.map(self._split, by_features)
        return loss, jax.lax.scan(add, by_params, (parts, cotangents))[0]

    def _encode(self, params, inputs):
        """(sentences, words, videos, frames) of a batch: all that has a gradient."""
        apply = functools.partial(self.model.apply, {"params": params})
        text = apply(inputs["ids"], inputs["text_mask"], method="encode_text")
        video = apply(inputs["frames"], inputs["frame_mask"], method="encode_video")
        return text.sentence, text.words, video.video, video.frames

    def _loss(self, params, features, batch):
        """(loss, accuracy) of features."""
        sentence, words, video, frames = features
        text = TextFeatures(sentence, words, batch["text_mask"])
        video = VideoFeatures(video, frames, batch["frame_mask"])
        sim_TxV = self.similarity(params, text, video)
        ignored = batch["video"] if self.same_video == "ignore" else None
        right = batch["video"][jnp.argmax(sim_TxV, 1)] == batch["video"]
        return contrastive_loss(sim_TxV, ignored, self.loss_scale), jnp.mean(right)

    def similarity(self, params, text, video):
        """T x V logits, block by block of texts where they are too many; exact in either case."""

        def compare(block):
            return self.model.apply({"params": params}, block, video, method="similarity")

        rows = self._block_rows(text, video)
        if rows == len(text.mask):
            return compare(text)
        text = constrain(text, self.mesh and replicated(self.mesh))
        blocks = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), text)
        sim_TxV = jax.lax.map(jax.checkpoint(compare), blocks)
        return sim_TxV.reshape(len(text.mask), -1)

    def _block_rows(self, text, video):
        """Texts a block: the most that divide them and keep within the cells."""
        num_texts, num_words = text.mask.shape
        num_videos, num_frames = video.mask.shape
        devices = self.mesh.size if self.mesh else 1
        a_row = self.model.pair_cells(num_words, num_frames) * num_videos // devices
        most = max(1, (self.block_cells or BLOCK_CELLS) // a_row)
        return max(
            rows for rows in range(1, num_texts + 1) if num_texts % rows == 0 and rows <= most
        )

    def _split(self, x):
        """B x ... -> micro-batches x pairs x ...; each device cuts up its own share."""
        devices = self.mesh.size if self.mesh else 1
        count = len(x) // self.micro_batch
        x = x.reshape(devices, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return self._spread(x.reshape(count, self.micro_batch, *x.shape[3:]), 1)

    def _join(self, x):
        """The inverse of `_split`."""
        devices = self.mesh.size if self.mesh else 1
        x = x.reshape(len(x), devices, -1, *x.shape[2:]).swapaxes(0, 1)
        return self._spread(x.reshape(-1, *x.shape[3:]), 0)

    def _spread(self, x, axis):
        """Keeps the pairs, on this axis, split over the devices."""
        if self.mesh is None:
            return x
        spec = PartitionSpec(*[None] * axis, AXES)
        return constrain(x, NamedSharding(self.mesh, spec))


_INPUTS = ("ids", "text_mask", "frames", "frame_mask")
