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
    """Returns a mesh of data x fsdp of the devices (by default all), see MeshConfig.

    Raises InputError if the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    available = len(devices)
    if available % fsdp and data == -1:
        raise InputError(f"config.mesh.fsdp = {fsdp}: must divide the {available} devices")
    data = available // fsdp if data == -1 else data
    at_most = "at most" if jax.process_count() == 1 else "exactly"
    if data * fsdp > available or (at_most == "exactly" and data * fsdp != available):
        needed = f"together they must be {at_most} the {available} devices"
        raise InputError(f"config.mesh.data = {data}, fsdp = {fsdp}: {needed}")
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

    It is split along its largest axis that `fsdp` divides, the last one if several are equal.
    """
    axes = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or not axes or math.prod(shape) < SPLIT_SIZE:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*("fsdp" if axis == largest else None for axis in range(len(shape))))


def summarize_split(params: Any, mesh: Mesh) -> str:
    """Returns how many parameters are split and how the four largest arrays are, in lines."""
    data, fsdp = (mesh.shape[axis] for axis in AXES)
    rows = [(path, x, split_spec(x.shape, fsdp)) for path, x in jax.tree.leaves_with_path(params)]
    rows.sort(key=lambda row: -row[1].size)
    total = sum(x.size for _, x, _ in rows) / 1e6
    split = sum(x.size for _, x, spec in rows if spec != PartitionSpec()) / 1e6
    text = f"mesh: data {data} x fsdp {fsdp}, which splits {split:.1f} of {total:.1f} M parameters"
    for path, x, spec in rows[:4] if fsdp > 1 else []:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        text += f"\n  {name:50}{x.shape!s:>20}  {spec}"
    return text


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on the devices, split along the leading axis."""
    sharding = over_batch(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def constrain(tree: Any, sharding: NamedSharding | None) -> Any:
    """Constrains the placement of arrays at this point of a program, unless `sharding` is None."""
    return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)
