"""The device mesh, and where arrays live on it."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xclip_jax.errors import InputError


def make_mesh(data):
    """A mesh with the axis `data`, over which batches are split; -1: all devices.

    Raises:
        InputError: more devices are asked for than there are.
    """
    available = len(jax.devices())
    count = available if data == -1 else data
    if count > available:
        raise InputError(f"config.mesh.data = {data}: must be at most the {available} devices here")
    return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count])


def replicated(mesh):
    """The sharding of what every device holds whole: parameters and optimizer state."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch, mesh):
    """Puts this process's share of a batch on the devices, split along the leading axis."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def check_batch_size(batch_size, mesh):
    """Raises InputError, naming the nearest sizes that fit, if a batch cannot be split evenly."""
    count = mesh.shape["data"]
    if batch_size % count:
        below = batch_size // count * count
        nearest = " or ".join(str(size) for size in (below, below + count) if size)
        raise InputError(
            f"config.train.batch_size = {batch_size}: must be a multiple of the {count} devices, "
            f"for example {nearest}"
        )
