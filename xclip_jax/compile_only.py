"""Compiles the training step without running it: memory, work and communication in advance.

    python -m xclip_jax.main --config=configs/demo.py --compile_only
    python -m xclip_jax.main --config=configs/demo.py --compile_only --topology=v6e:2x4

With the libtpu wheel (`pip install libtpu`) the second command compiles for a TPU slice on
any machine. A model of CLIP's size takes minutes.
"""

import collections
import math
import os
import re
from importlib.util import find_spec
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from xclip_jax import sharding
from xclip_jax.checkpoint import model_folder
from xclip_jax.cli import InputError, first_line
from xclip_jax.config import RunConfig
from xclip_jax.models import XClip
from xclip_jax.optimizer import make_optimizer
from xclip_jax.train import check_batch_sizes, compile_training, configure_model

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
CLIP_VOCABULARY = 49408
SCHEDULE_STEPS = 1000  # any number: the program does not depend on it


def compile_only(config: RunConfig, topology: str = "") -> dict[str, str]:
    """Compiles the training step of a config, prints and returns {quantity: text}.

    Args:
        config: the run's config; its data is not read.
        topology: generation and shape of a TPU slice, such as v4:2x2x2, v5e:2x4, v5p:2x2x1 or
            v6e:4x4; "": the devices of this machine.

    Raises InputError if the topology does not exist, libtpu is not installed, or the step does not
    fit into the devices' memory: the message has settings with which it does.
    """
    devices = None
    if topology:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server outside the cloud
        try:
            devices = topologies.get_topology_desc(topology, platform="tpu").devices
        except Exception as error:  # libtpu has no common type
            hint = "such as v6e:2x4" if find_spec("libtpu") else "needs pip install libtpu"
            raise InputError(f"--topology={topology}: {first_line(error)} ({hint})") from None
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    check_batch_sizes(config, mesh)
    vocabulary = config.model.text.vocab_size
    try:
        traced, compiled = _compile_step(config, mesh)
        if (peak := peak_bytes(compiled)) > (memory := device_memory(mesh)):
            sizes = f"{peak / 2**30:.2f} GiB a device of {memory / 2**30:.2f} GiB"
            raise MemoryError(sizes)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        problem = f"the training step does not fit: {first_line(error):.500}"
        raise InputError(f"{problem}; {_find_fitting_settings(config, mesh)}") from None
    try:
        names = re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled.as_text())
        counts = sorted(collections.Counter(names).items())
        collectives = ", ".join(f"{count} {name}" for name, count in counts) or "none"
    except jax.errors.JaxRuntimeError:  # XLA cannot print some fused operations of libtpu
        collectives = "unknown: the compiled program cannot be printed"
    held = held_bytes(compiled)
    figures = {
        "state and batch, a device": f"{held / 2**30:.2f} GiB",
        "temporary memory, a device": f"{(peak - held) / 2**30:.2f} GiB",
        "peak memory, a device": f"{peak / 2**30:.2f} GiB",
        "matrix products, FLOP a step": f"{matrix_flops(traced.jaxpr.jaxpr):.3g}, all devices",
        "collectives in the program": collectives,
    }
    clip = config.init.clip
    if clip and not (model_folder(clip) / "model.json").is_file():
        figures["encoders"] = f"as the config says: there is no model in {clip}"
    if not vocabulary:
        figures["vocabulary"] = f"{CLIP_VOCABULARY} as CLIP's; training takes the tokenizer's"
    print(f"{mesh.size} x {mesh.devices.flat[0].device_kind}, batch {config.train.batch_size}")
    for name, value in figures.items():
        print(f"  {name:34}{value}")
    return figures


def _compile_step(config: RunConfig, mesh: Mesh) -> tuple[Any, Any]:
    """Returns the traced and the compiled training step."""
    vocabulary = config.model.text.vocab_size or CLIP_VOCABULARY
    model = XClip(configure_model(config, vocabulary))
    _, optimizer = make_optimizer(config.optimizer, SCHEDULE_STEPS)
    init, step = compile_training(model, optimizer, config, mesh)
    traced = step.trace(init.eval_shape(), batch_shapes(config, mesh))
    return traced, traced.lower().compile()


def _find_fitting_settings(config: RunConfig, mesh: Mesh) -> str:
    """Returns the first settings of less memory and more time with which the step compiles."""
    size, fields = config.train.batch_size, cast("Any", config)
    smaller = fields.copy_and_resolve_references()
    divisors = [n for n in range(size // 2, 0, -1) if size % n == 0 and n % mesh.size == 0]
    for micro_batch in (config.train.micro_batch, *divisors):
        for remat in ("dots", "layers"):
            smaller.model.remat, smaller.train.micro_batch = remat, micro_batch
            flags = f"--config.model.remat={remat} --config.train.micro_batch={micro_batch}"
            print(f"trying {flags}", flush=True)
            try:
                _, compiled = _compile_step(smaller, mesh)
            except jax.errors.JaxRuntimeError:
                continue
            if (peak := peak_bytes(compiled)) <= device_memory(mesh):
                return f"it fits with {flags}: {peak / 2**30:.2f} GiB a device"
    return "nor does it with smaller micro-batches: use more devices and --config.mesh.fsdp"


def held_bytes(compiled: Any) -> int:
    """Returns the bytes of state and batch on a device."""
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return sizes - memory.alias_size_in_bytes


def peak_bytes(compiled: Any) -> int:
    """Returns the bytes of state, batch and temporary arrays on a device."""
    return held_bytes(compiled) + compiled.memory_analysis().temp_size_in_bytes


def device_memory(mesh: Mesh) -> float:
    """Returns the bytes of memory of a device, infinite if unknown."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    try:
        return device.memory_stats()["bytes_limit"]
    except (AttributeError, KeyError, TypeError, jax.errors.JaxRuntimeError):
        return math.inf  # of a topology, for which the compiler counts


def matrix_flops(jaxpr: Any) -> int:
    """Counts the floating-point operations of matrix products, including recomputation.

    The compiler's own count includes the body of a loop, such as the layers of a tower, only once.
    """
    total = 0
    for equation in jaxpr.eqns:
        params = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
        inner = [matrix_flops(x) for x in params if hasattr(x, "eqns")]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            terms = math.prod(left[axis] for axis in contracted)
            total += 2 * terms * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "cond":  # one branch runs
            total += max(inner)
        elif equation.primitive.name == "shard_map":  # on each device
            total += sum(inner) * equation.params["mesh"].size
        else:
            total += sum(inner) * equation.params.get("length", 1)  # length of a scan
    return total


def batch_shapes(config: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and shardings of a batch, see `training_batches`."""
    size, m = config.train.batch_size, config.model
    side, words, frames = m.vision.image_size, (size, m.max_words), (size, m.max_frames)
    types = {
        "ids": (words, jnp.int32),
        "text_mask": (words, jnp.bool_),
        "frames": ((*frames, side, side, 3), jnp.uint8),
        "frame_mask": (frames, jnp.bool_),
        "video": ((size,), jnp.int32),
    }
    placed = sharding.over_batch(mesh)
    return {k: jax.ShapeDtypeStruct(*shape, sharding=placed) for k, shape in types.items()}
