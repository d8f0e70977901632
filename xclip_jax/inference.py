"""Runs models on batches that are padded to a few sizes, so each is compiled only a few times."""

import collections
import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xclip_jax.distributed import is_first_process
from xclip_jax.models import ModelConfig, XClip

PyTree = Any
Tree = TypeVar("Tree")
T = TypeVar("T")


def note_compute_dtype(config: ModelConfig) -> None:
    """Prints once, on stderr, if a model of `dtype=auto` does not compute in float32."""
    if config.dtype == "auto" and config.compute_dtype != "float32" and is_first_process():
        _print_note(f"computing in {config.compute_dtype} on this device: model.dtype=auto")


@functools.cache
def _print_note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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


def split_like(tree: Tree, params: PyTree) -> Tree:
    """Copies a batch to the parameters' devices, split over them if it divides, else whole."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jax.device_put(tree)
    mesh, size = sharding.mesh, len(jax.tree.leaves(tree)[0])
    spec = PartitionSpec(mesh.axis_names) if size % mesh.size == 0 else PartitionSpec()
    return jax.device_put(tree, NamedSharding(mesh, spec))


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply_model(params: PyTree, *inputs: Any, model: XClip, method: Any) -> Any:
    """Returns a method of a model, or a function of it, applied to inputs, jitted."""
    return model.apply({"params": params}, *inputs, method=method)


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


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yields items one late: a device computes the next while the host copies the last."""
    waiting = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def slice_rows(tree: Tree, start: int, count: int = 1) -> Tree:
    """Returns `count` rows of every array of a tree, from row `start` on."""
    return jax.tree.map(lambda array: array[start : start + count], tree)


def next_power_of_two(size: int) -> int:
    """Returns the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def power_of_four(size: int, *, up: bool) -> int:
    """Returns the nearest power of four that is at least (`up`) or at most `size`."""
    exponent = (size.bit_length() - 1) // 2
    power = 4**exponent
    return 4 * power if up and power < size else power


def split_counts(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields (start, count) of batches of `size` rows, then of powers of four.

    However many rows there are, batches have few sizes, so that few are compiled.
    """
    start = 0
    while start < total:
        rest = total - start
        count = size if rest >= size else power_of_four(rest, up=False)
        yield start, count
        start += count


def pad_rows(tree: Tree, size: int) -> Tree:
    """Pads the leading axis of every array with zeros (False in masks) to `size`."""

    def pad(array: Any) -> Any:
        missing = size - len(array)
        return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array

    return jax.tree.map(pad, tree)
