"""Logits of all pairs in parts: in blocks of texts on a device, in a ring over devices.

In the ring each device keeps its own texts, and videos are sent from device to device: a video has
fewer frames than a text has words. A device's memory falls with the number of devices.
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
    """Returns the logits of all pairs, split over devices along the texts.

    In each step a device compares its texts with the videos it holds and sends these on. In the
    backward pass the videos are sent again, with their gradients. Automatic differentiation would
    save the videos of each step on each device.
    """
    return _on_each_device(_compare, compare, mesh, (_SPECS, _ROWS))(*inputs)


def _forward(compare: Compare, mesh: Mesh, inputs: Inputs) -> tuple[Array, Inputs]:
    return compare_in_ring(compare, mesh, inputs), inputs


def _backward(compare: Compare, mesh: Mesh, inputs: Inputs, by_sim_GxTxV: Array) -> Any:
    specs = (*_SPECS, _ROWS), _SPECS[:3]
    gradients = _on_each_device(_differentiate, compare, mesh, specs)(*inputs, by_sim_GxTxV)
    return ((*gradients, None),)


compare_in_ring.defvjp(_forward, _backward)

_SPECS = PartitionSpec(), PartitionSpec(AXES), PartitionSpec(AXES), PartitionSpec()  # of Inputs
_ROWS = PartitionSpec(None, AXES)


def _on_each_device(function: Callable, compare: Compare, mesh: Mesh, specs: Any) -> Callable:
    options: Any = {"in_specs": specs[0], "out_specs": specs[1], "check_vma": False}
    return jax.shard_map(functools.partial(function, compare), mesh=mesh, **options)


def _compare(compare: Compare, *inputs: Any) -> Float[Array, "G T V"]:
    """Returns the logits of a device's texts with all videos."""
    params, text, video, key = inputs
    key = _fold_in(key, jax.lax.axis_index(AXES))

    def add_block(carry: Any, source: Array) -> tuple[Any, None]:
        video, sim_GxTxV = carry
        block = compare(params, text, video, _fold_in(key, source))
        start = source * len(video.mask)
        sim_GxTxV = jax.lax.dynamic_update_slice_in_dim(sim_GxTxV, block, start, 2)
        return (_send(video), sim_GxTxV), None

    block = jax.eval_shape(compare, *inputs)
    empty_GxTxV = jnp.zeros(block.shape, block.dtype).repeat(jax.lax.axis_size(AXES), 2)
    return jax.lax.scan(add_block, (video, empty_GxTxV), _sources())[0][1]


def _differentiate(compare: Compare, *inputs: Any) -> tuple[Any, TextFeatures, VideoFeatures]:
    """Returns the gradients of the parameters, a device's texts and its videos."""
    params, text, video, key, by_sim_GxTxV = inputs
    key = _fold_in(key, jax.lax.axis_index(AXES))

    def add_block(carry: Any, source: Array) -> tuple[Any, None]:
        video, by_video, totals = carry

        def compare_floats(params: Any, text_floats: Any, video_floats: Any) -> Array:
            features = text_floats.replace(mask=text.mask), video_floats.replace(mask=video.mask)
            return compare(params, *features, _fold_in(key, source))

        columns = source * len(video.mask), len(video.mask)
        by_block = jax.lax.dynamic_slice_in_dim(by_sim_GxTxV, *columns, 2)
        _, pull_back = jax.vjp(compare_floats, params, *map(_without_mask, (text, video)))
        by_params, by_text, by_held = pull_back(by_block)
        # Gradients are sent before those of this block are added: both can run at the same time.
        by_video = _add(_send(by_video), by_held)
        return (_send(video), by_video, _add(totals, (by_params, by_text))), None

    floats = params, *map(_without_mask, (text, video))
    *totals, by_video = jax.tree.map(jnp.zeros_like, floats)
    carry, _ = jax.lax.scan(add_block, (video, by_video, tuple(totals)), _sources())
    _, by_video, (by_params, by_text) = carry
    return jax.lax.psum(by_params, AXES), by_text, _send(by_video)


def _sources() -> Int[Array, " N"]:
    """Returns the device from which the videos come that this device holds, for each step."""
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
