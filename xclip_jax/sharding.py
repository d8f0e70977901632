"""The device mesh and the placement of arrays on it.

Batches are split over all devices. Parameters and optimizer state are replicated or, with an `fsdp`
axis, each large array is split over it and gathered at the start of a step.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xclip_jax.cli import InputError

AXES = ("data", "fsdp")  # batches are split over both
SPLIT_SIZE = 1 << 16  # smallest number of elements of an array that is split over fsdp


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of data x fsdp devices.

    Args:
        data: devices along which only the batch is split; -1: as many as there are.
        fsdp: devices along which large parameters are split too.
        devices: devices to use; default: all.

    Raises:
        InputError: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    available = len(devices)
    if available % fsdp and data == -1:
        raise InputError(f"config.mesh.fsdp = {fsdp}: must divide the {available} devices")
    data = available // fsdp if data == -1 else data
    if data * fsdp > available or (jax.process_count() > 1 and data * fsdp != available):
        exactly = "exactly" if jax.process_count() > 1 else "at most"
        raise InputError(
            f"config.mesh.data = {data}, fsdp = {fsdp}: together they must be {exactly} the "
            f"{available} devices"
        )
    chosen = devices[: data * fsdp]
    return jax.make_mesh((data, fsdp), AXES, (AxisType.Auto,) * 2, devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: along its leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a pytree of parameters and optimizer state, arrays or shapes."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda x: NamedSharding(mesh, split_spec(x.shape, fsdp)), state)


def split_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Returns how an array of at least SPLIT_SIZE elements is split over `fsdp` devices.

    It is split along its largest axis that `fsdp` divides, the last one of equals.
    """
    axes = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or not axes or math.prod(shape) < SPLIT_SIZE:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*("fsdp" if axis == largest else None for axis in range(len(shape))))


def summarize_split(params: Any, mesh: Mesh) -> list[str]:
    """Returns lines on how many parameters are split and on how the largest arrays are."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    fsdp = mesh.shape["fsdp"]
    total = sum(x.size for _, x in leaves)
    split = sum(x.size for _, x in leaves if split_spec(x.shape, fsdp) != PartitionSpec())
    lines = [
        f"mesh: data {mesh.shape['data']} x fsdp {fsdp}; {split / 1e6:.1f} M of "
        f"{total / 1e6:.1f} M parameters are split over fsdp"
    ]
    for path, x in sorted(leaves, key=lambda leaf: -leaf[1].size)[: 4 * (fsdp > 1)]:
        name = "/".join(entry.key for entry in path)
        lines.append(f"  {name:50}{x.shape!s:>20}  {split_spec(x.shape, fsdp)}")
    return lines


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on the devices, split along the leading axis."""
    sharding = over_batch(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def constrain(tree: Any, sharding: NamedSharding | None) -> Any:
    """Constrains the placement of arrays at this point of a program, unless `sharding` is None."""
    return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)


def check_batch_size(field: str, batch_size: int, mesh: Mesh) -> None:
    """Raises InputError, with the nearest valid sizes, if a batch cannot be split evenly."""
    count = mesh.size
    if batch_size % count:
        below = batch_size // count * count
        nearest = " or ".join(str(size) for size in (below, below + count) if size)
        raise InputError(
            f"config.train.{field} = {batch_size}: must be a multiple of the {count} devices, "
            f"for example {nearest}"
        )
