"""Logits of all pairs in parts: in blocks of texts on a device, in a ring over devices.

In the ring each device keeps its own videos, and texts are sent from device to device. Memory and
communication of a device fall with the number of devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from xclip_jax.sharding import AXES
from xclip_jax.similarity import TextFeatures, VideoFeatures

# Parameters, T texts, V videos, key of the dropout or None.
Inputs = tuple[Any, TextFeatures, VideoFeatures, Array | None]
Compare = Callable[..., Array]  # of Inputs, to G x T x V logits


def compare_in_blocks(compare: Compare, limit: int, *inputs: Any) -> Float[Array, "G T V"]:
    """Returns the logits of all pairs, in blocks of at most `limit` texts.

    If there are several blocks, they are computed one by one, and again in the backward pass.
    """
    params, text, video, key = inputs
    num_texts, num_videos = len(text.mask), len(video.mask)
    rows = max(n for n in range(1, num_texts + 1) if num_texts % n == 0 and n <= limit)
    if rows == num_texts:
        return compare(params, text, video, key)
    count = num_texts // rows
    blocks = jax.tree.map(lambda x: x.reshape(count, rows, *x.shape[1:]), text)
    keys = None if key is None else jax.random.split(key, count)
    compare_block = jax.checkpoint(lambda block: compare(params, block[0], video, block[1]))
    sim_NxGxRxV = jax.lax.map(compare_block, (blocks, keys))
    return jnp.swapaxes(sim_NxGxRxV, 0, 1).reshape(-1, num_texts, num_videos)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def compare_in_ring(compare: Compare, mesh: Mesh, inputs: Inputs) -> Float[Array, "G T V"]:
    """Returns the logits of all pairs, split over devices along the videos.

    In each step a device compares the texts it holds with its videos and sends them on. In the
    backward pass texts go round again, with their gradients. Automatic differentiation would save
    the texts of all steps, which are all texts, on each device.
    """
    return _on_each_device(_compare, compare, mesh, (_SPECS, _COLUMNS))(*inputs)


def _forward(compare: Compare, mesh: Mesh, inputs: Inputs) -> tuple[Array, Inputs]:
    return compare_in_ring(compare, mesh, inputs), inputs


def _backward(compare: Compare, mesh: Mesh, inputs: Inputs, by_sim_GxTxV: Array) -> Any:
    specs = (*_SPECS, _COLUMNS), _SPECS[:3]
    gradients = _on_each_device(_differentiate, compare, mesh, specs)(*inputs, by_sim_GxTxV)
    return ((*gradients, None),)


compare_in_ring.defvjp(_forward, _backward)

_SPECS = PartitionSpec(), PartitionSpec(AXES), PartitionSpec(AXES), PartitionSpec()  # of Inputs
_COLUMNS = PartitionSpec(None, None, AXES)


def _on_each_device(function: Callable, compare: Compare, mesh: Mesh, specs: Any) -> Callable:
    options: Any = {"in_specs": specs[0], "out_specs": specs[1], "check_vma": False}
    return jax.shard_map(functools.partial(function, compare), mesh=mesh, **options)


def _compare(compare: Compare, *inputs: Any) -> Float[Array, "G T V"]:
    """Returns the logits of all texts with a device's videos."""
    params, text, video, key = inputs
    key = _fold_in(key, jax.lax.axis_index(AXES))

    def add_block(carry: Any, source: Array) -> tuple[Any, None]:
        text, sim_GxTxV = carry
        block = compare(params, text, video, _fold_in(key, source))
        start = source * len(text.mask)
        sim_GxTxV = jax.lax.dynamic_update_slice_in_dim(sim_GxTxV, block, start, 1)
        return (_send(text), sim_GxTxV), None

    block = jax.eval_shape(compare, *inputs)
    empty_GxTxV = jnp.zeros(block.shape, block.dtype).repeat(jax.lax.axis_size(AXES), 1)
    return jax.lax.scan(add_block, (text, empty_GxTxV), _sources())[0][1]


def _differentiate(compare: Compare, *inputs: Any) -> tuple[Any, TextFeatures, VideoFeatures]:
    """Returns the gradients of the parameters, a device's texts and its videos."""
    params, text, video, key, by_sim_GxTxV = inputs
    key = _fold_in(key, jax.lax.axis_index(AXES))

    def add_block(carry: Any, source: Array) -> tuple[Any, None]:
        text, by_text, totals = carry

        def compare_held(params: Any, text_floats: Any, video_floats: Any) -> Array:
            features = text_floats.replace(mask=text.mask), video_floats.replace(mask=video.mask)
            return compare(params, *features, _fold_in(key, source))

        rows = source * len(text.mask), len(text.mask)
        by_block = jax.lax.dynamic_slice_in_dim(by_sim_GxTxV, *rows, 1)
        _, pull_back = jax.vjp(compare_held, params, *map(_without_mask, (text, video)))
        by_params, by_held, by_video = pull_back(by_block)
        # The gradients travel while the block is computed.
        by_text = _add(_send(by_text), by_held)
        return (_send(text), by_text, _add(totals, (by_params, by_video))), None

    zeros = jax.tree.map(jnp.zeros_like, (params, *map(_without_mask, (text, video))))
    carry = text, zeros[1], (zeros[0], zeros[2])
    (_, by_text, (by_params, by_video)), _ = jax.lax.scan(add_block, carry, _sources())
    return jax.lax.psum(by_params, AXES), _send(by_text), by_video


def _sources() -> Int[Array, " N"]:
    """Returns the devices from which the texts come that a device holds, one per step."""
    size = jax.lax.axis_size(AXES)
    return (jax.lax.axis_index(AXES) - jnp.arange(size)) % size


def _send(x: Any) -> Any:
    """Sends arrays to the next device and returns those of the previous one."""
    size = jax.lax.axis_size(AXES)
    return jax.lax.ppermute(x, AXES, [(n, (n + 1) % size) for n in range(size)])


def _fold_in(key: Array | None, number: Array) -> Array | None:
    return None if key is None else jax.random.fold_in(key, number)


def _without_mask(features: Any) -> Any:
    """Returns features without their mask, which has no gradient."""
    return features.replace(mask=None)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)
