"""Encoding and similarity of any number of texts and videos in bounded memory.

Batches are padded to a few sizes, so that nothing is compiled twice for the same model.
"""

import functools

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def on_local_devices(params):
    """Parameters, wherever they are, whole on each device of this process.

    What is encoded or compared with them is then spread over these devices.
    """
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)
    whole = jax.tree.map(_whole, params)
    return jax.device_put(whole, NamedSharding(mesh, PartitionSpec()))


def _whole(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _spread(tree, params):
    """The tree on the devices of the parameters, split along its leading axis if that divides."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return tree
    mesh = sharding.mesh
    size = len(jax.tree.leaves(tree)[0])
    spec = PartitionSpec(mesh.axis_names) if size % mesh.size == 0 else PartitionSpec()
    return jax.device_put(tree, NamedSharding(mesh, spec))


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply_model(params, *args, model, method):
    """`method` of the model with these parameters, compiled once for each shape."""
    return model.apply({"params": params}, *args, method=method)


def encode_texts(model, params, ids_TxW, mask_TxW, batch_size=64):
    """TextFeatures (NumPy) of any number of texts."""
    return _in_batches(model, params, "encode_text", batch_size, ids_TxW, mask_TxW)


def encode_videos(model, params, frames_VxFxSxSx3, mask_VxF, batch_size=64):
    """VideoFeatures (NumPy) of any number of videos."""
    return _in_batches(model, params, "encode_video", batch_size, frames_VxFxSxSx3, mask_VxF)


def similarity_in_blocks(model, params, text, video, block_cells=0, bar=None):
    """T x V float32 logits on the host, computed block by block on the device.

    Memory besides the features and the result is that of one block, whatever T and V are.

    Args:
        text, video: TextFeatures and VideoFeatures, NumPy.
        block_cells: word-frame cells a block; 0: what suits the device.
        bar: optional progress bar, moved on by the pairs done.
    """
    num_texts, num_videos = len(text.mask), len(video.mask)
    height, columns = block_plan(model, text, video, block_cells)
    sim_TxV = np.empty((num_texts, num_videos), np.float32)
    for j in range(0, num_videos, columns):
        block_video = _spread(_pad(slice_rows(video, j, columns), columns), params)
        for i in range(0, num_texts, height):
            block_text = _pad(slice_rows(text, i, height), height)
            block = apply_model(params, block_text, block_video, model=model, method="similarity")
            part = sim_TxV[i : i + height, j : j + columns]
            part[:] = np.asarray(block)[: part.shape[0], : part.shape[1]]
            if bar is not None:
                bar.update(part.size)
    return sim_TxV


def block_plan(model, text, video, block_cells=0):
    """(texts, videos) that `similarity_in_blocks` compares at once."""
    cells_a_pair = model.config.cells_per_pair(text.mask.shape[1], video.mask.shape[1])
    texts, videos = block_shape(cells_a_pair, block_cells or default_block_cells())
    return min(texts, _round_up(len(text.mask))), min(videos, _round_up(len(video.mask)))


def default_block_cells():
    """On CPU a block that stays in the cache, elsewhere one that fills the device."""
    return 1 << (20 if jax.default_backend() == "cpu" else 26)


def block_shape(cells_a_pair, block_cells):
    """(texts, videos) of a block: more videos than texts, the videos being the vectorised axis."""
    pairs = max(1, block_cells // cells_a_pair)
    videos = max(1, min(pairs, 1 << ((pairs.bit_length() + 4) // 2)))
    return max(1, pairs // videos), videos


def concatenate_features(parts, total):
    """Joins features along the leading axis, whose length is `total`.

    `parts` is an iterator: no more than one of them is in memory besides the whole.
    """
    whole, start = None, 0
    for part in parts:
        if whole is None:
            whole = jax.tree.map(lambda x: np.empty((total, *x.shape[1:]), x.dtype), part)
        for array, some in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            array[start : start + len(some)] = some
        start += len(jax.tree.leaves(part)[0])
    if start != total:
        raise ValueError(f"{start} rows where there should be {total}")
    return whole


def _in_batches(model, params, method, batch_size, *arrays):
    """Applies an encoder to chunks of at most batch_size, each padded to a power of two."""
    total = len(arrays[0])
    if not total:
        raise ValueError("nothing to encode")

    def encoded():
        for start in range(0, total, batch_size):
            chunk = slice_rows(arrays, start, batch_size)
            size = len(chunk[0])
            padded = _spread(_pad(chunk, min(batch_size, _round_up(size))), params)
            features = apply_model(params, *padded, model=model, method=method)
            yield slice_rows(jax.tree.map(np.asarray, features), 0, size)

    return concatenate_features(encoded(), total)


def _round_up(size):
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def slice_rows(tree, start, count):
    """`count` rows of every array of the tree, from row `start` on."""
    return jax.tree.map(lambda array: array[start : start + count], tree)


def _pad(tree, size):
    """Pads the leading axis with zeros (masks with False) up to `size`."""

    def pad(array):
        missing = size - len(array)
        return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array

    return jax.tree.map(pad, tree)
