"""The device mesh, and where arrays live on it.

Batches are split over all devices. Parameters and optimizer state are whole on every device, or,
with an `fsdp` axis, each large array is split over it and gathered at the start of a step.
"""

import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xclip_jax.cli import InputError

AXES = ("data", "fsdp")  # batches are split over both
SPLIT_SIZE = 1 << 16  # numbers; smaller arrays are whole on every device


def make_mesh(data=-1, fsdp=1, devices=None):
    """A mesh of data x fsdp of the devices (default: all); data = -1: as many as there are.

    Raises:
        InputError: the numbers do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    available = len(devices)
    if available % fsdp and data == -1:
        raise InputError(f"config.mesh.fsdp = {fsdp}: must divide the {available} devices here")
    data = available // fsdp if data == -1 else data
    if data * fsdp > available or (jax.process_count() > 1 and data * fsdp != available):
        exactly = "exactly" if jax.process_count() > 1 else "at most"
        raise InputError(
            f"config.mesh.data = {data}, fsdp = {fsdp}: together they must be {exactly} the "
            f"{available} devices here"
        )
    chosen = devices[: data * fsdp]
    return jax.make_mesh((data, fsdp), AXES, (AxisType.Auto,) * 2, devices=chosen)


def replicated(mesh):
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh):
    """The sharding of a batch: along its leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(state, mesh):
    """Shardings of a pytree of arrays (or their shapes): parameters and optimizer state."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda x: NamedSharding(mesh, split_spec(x.shape, fsdp)), state)


def split_spec(shape, fsdp):
    """The rule: an array of at least SPLIT_SIZE numbers is split along its largest axis that
    `fsdp` divides, the last of equals.
    """
    axes = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or not axes or math.prod(shape) < SPLIT_SIZE:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*("fsdp" if axis == largest else None for axis in range(len(shape))))


def describe(params, mesh):
    """A line on what is split, and lines on the largest arrays: name, shape, how it is split."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    fsdp = mesh.shape["fsdp"]
    split = [x for _, x in leaves if split_spec(x.shape, fsdp) != PartitionSpec()]
    total, parts = (sum(math.prod(x.shape) for x in xs) for xs in ((x for _, x in leaves), split))
    lines = [
        f"mesh: data {mesh.shape['data']} x fsdp {fsdp}; {parts / 1e6:.1f} M of "
        f"{total / 1e6:.1f} M parameters are split over fsdp"
    ]
    for path, x in sorted(leaves, key=lambda leaf: -math.prod(leaf[1].shape))[: 4 * (fsdp > 1)]:
        name = "/".join(entry.key for entry in path)
        lines.append(f"  {name:50}{x.shape!s:>20}  {split_spec(x.shape, fsdp)}")
    return lines


def shard_batch(batch, mesh):
    """Puts this process's share of a batch on the devices, split along the leading axis."""
    sharding = over_batch(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def constrain(tree, sharding):
    """Tells the compiler where arrays live at this point of a program; None: wherever it likes."""
    return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)


def check_batch_size(field, batch_size, mesh):
    """Raises InputError, naming the nearest sizes that fit, if a batch cannot be split evenly."""
    count = mesh.size
    if batch_size % count:
        below = batch_size // count * count
        nearest = " or ".join(str(size) for size in (below, below + count) if size)
        raise InputError(
            f"config.train.{field} = {batch_size}: must be a multiple of the {count} devices, "
            f"for example {nearest}"
        )
