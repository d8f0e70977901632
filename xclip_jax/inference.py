"""Encodes and compares any number of texts and videos in bounded memory.

Batches are padded to a few sizes, so each model is compiled only a few times.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Float
from tqdm import tqdm

from xclip_jax.models import XClip
from xclip_jax.similarity import AnyArray, TextFeatures, VideoFeatures

PyTree = Any
Tree = TypeVar("Tree")


def copy_to_local_devices(params: PyTree) -> PyTree:
    """Returns parameters replicated on every device of this process.

    Batches that are applied to them are then split over these devices.
    """
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)

    def gather(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.device_put(jax.tree.map(gather, params), NamedSharding(mesh, PartitionSpec()))


def _split_like(tree: Tree, params: PyTree) -> Tree:
    """Splits a batch over the parameters' devices, or replicates it if it does not divide."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return tree
    mesh, size = sharding.mesh, len(jax.tree.leaves(tree)[0])
    spec = PartitionSpec(mesh.axis_names) if size % mesh.size == 0 else PartitionSpec()
    return jax.device_put(tree, NamedSharding(mesh, spec))


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply_model(params: PyTree, *inputs: Any, model: XClip, method: str) -> Any:
    """Returns `method` of a model applied to parameters and inputs, jitted."""
    return model.apply({"params": params}, *inputs, method=method)


def encode(
    model: XClip, params: PyTree, method: str, inputs: tuple[AnyArray, AnyArray], batch_size: int
) -> Any:
    """Returns the features of any number of texts or videos as NumPy arrays.

    Args:
        model, params: the linen module and its parameters.
        method: "encode_text" or "encode_video", of XClip.
        inputs: T x W ids or V x F x S x S x 3 frames, and their mask, T x W or V x F.
        batch_size: texts or videos encoded at once.

    Raises:
        ValueError: there is nothing to encode.
    """
    if not (total := len(inputs[0])):
        raise ValueError("must have at least one text or video to encode")

    def encode_batches() -> Iterator[PyTree]:
        for start in range(0, total, batch_size):
            rows = slice_rows(inputs, start, batch_size)
            size = len(rows[0])
            batch = _split_like(pad_rows(rows, min(batch_size, next_power_of_two(size))), params)
            features = apply_model(params, *batch, model=model, method=method)
            yield slice_rows(jax.tree.map(np.asarray, features), 0, size)

    return concatenate_features(encode_batches(), total)


def similarity_in_blocks(
    model: XClip,
    params: PyTree,
    text: TextFeatures,
    video: VideoFeatures,
    *,
    block_cells: int = 0,
    bar: tqdm | None = None,
) -> Float[np.ndarray, "T V"]:
    """Returns T x V float32 logits, computed block by block on the device.

    Args:
        model, params: the linen module and its parameters.
        text, video: NumPy features of T texts and V videos.
        block_cells: word-frame cells of a block; 0: chosen for the device.
        bar: progress bar, advanced by the number of pairs.
    """
    num_texts, num_videos = len(text.mask), len(video.mask)
    height, width = plan_blocks(model, text, video, block_cells)
    sim_TxV = np.empty((num_texts, num_videos), np.float32)
    for j in range(0, num_videos, width):
        block_video = _split_like(pad_rows(slice_rows(video, j, width), width), params)
        for i in range(0, num_texts, height):
            block_text = pad_rows(slice_rows(text, i, height), height)
            block = apply_model(params, block_text, block_video, model=model, method="similarity")
            part = sim_TxV[i : i + height, j : j + width]
            part[:] = np.asarray(block)[: part.shape[0], : part.shape[1]]
            if bar is not None:
                bar.update(part.size)
    return sim_TxV


def plan_blocks(
    model: XClip, text: TextFeatures, video: VideoFeatures, block_cells: int = 0
) -> tuple[int, int]:
    """Returns the numbers of texts and videos in a block of `similarity_in_blocks`."""
    if not block_cells:  # on CPU a block that fits the cache, else one that fills the device
        block_cells = 1 << (20 if jax.default_backend() == "cpu" else 26)
    (num_texts, num_words), (num_videos, num_frames) = text.mask.shape, video.mask.shape
    texts, videos = block_shape(model.config.cells_per_pair(num_words, num_frames), block_cells)
    return min(texts, next_power_of_two(num_texts)), min(videos, next_power_of_two(num_videos))


def block_shape(cells_per_pair: int, block_cells: int) -> tuple[int, int]:
    """Returns (texts, videos) of a block, with more videos, which are the vectorised axis."""
    pairs = max(1, block_cells // cells_per_pair)
    videos = max(1, min(pairs, 1 << ((pairs.bit_length() + 4) // 2)))
    return max(1, pairs // videos), videos


def concatenate_features(parts: Iterable[Tree], total: int) -> Tree:
    """Concatenates features along the leading axis, which has `total` rows.

    Only one part at a time is in memory besides the result.
    """
    result, end = None, 0
    for part in parts:
        if result is None:
            result = jax.tree.map(lambda x: np.empty((total, *x.shape[1:]), x.dtype), part)
        start, end = end, end + len(jax.tree.leaves(part)[0])
        for array, rows in zip(jax.tree.leaves(result), jax.tree.leaves(part), strict=True):
            array[start:end] = rows
    if result is None or end != total:
        raise ValueError(f"{end} rows of features, expected {total}")
    return result


def slice_rows(tree: Tree, start: int, count: int = 1) -> Tree:
    """Returns `count` rows of every array of a tree, from row `start` on."""
    return jax.tree.map(lambda array: array[start : start + count], tree)


def next_power_of_two(size: int) -> int:
    """Returns the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def pad_rows(tree: Tree, size: int) -> Tree:
    """Pads the leading axis of every array with zeros (False in masks) to `size`."""

    def pad(array: np.ndarray) -> np.ndarray:
        missing = size - len(array)
        return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array

    return jax.tree.map(pad, tree)
