"""Compiles the training step without running it: memory, work and communication in advance.

    python -m xclip_jax.main --config=configs/demo.py --compile_only
    python -m xclip_jax.main --config=configs/demo.py --compile_only --topology=v6e:2x4

With the libtpu wheel (`pip install libtpu`) the second compiles for a TPU slice on any machine. A
model of CLIP's size takes minutes.
"""

import collections
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from xclip_jax import sharding
from xclip_jax.cli import InputError
from xclip_jax.config import RunConfig
from xclip_jax.models import XClip, read_model_config
from xclip_jax.train import check_batch_sizes, compile_step, configured_optimizer, state_shapes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
CLIP_VOCABULARY = 49408
SCHEDULE_STEPS = 1000  # any number: the program does not depend on it


def compile_only(config: RunConfig, topology: str = "") -> dict[str, str]:
    """Compiles the training step of a config and prints the compiler's figures.

    Args:
        config: the run's config; its data is not read.
        topology: generation and shape of a TPU slice, such as v4:2x2x2, v5e:2x4, v5p:2x2x1 or
            v6e:4x4; "": the devices of this machine.

    Returns:
        {quantity: text} as printed.

    Raises:
        InputError: the topology does not exist, or libtpu is not installed.
    """
    devices = _find_devices(topology) if topology else None
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    check_batch_sizes(config, mesh)
    model_config, note = read_model_config(config.model), {}
    if not model_config.text.vocab_size:
        text = dataclasses.replace(model_config.text, vocab_size=CLIP_VOCABULARY)
        model_config = dataclasses.replace(model_config, text=text)
        note = {"vocabulary": f"{CLIP_VOCABULARY} as CLIP's; training takes the tokenizer's"}
    model = XClip(model_config)
    _, optimizer = configured_optimizer(config, SCHEDULE_STEPS)
    state = state_shapes(model, optimizer, mesh)
    step = compile_step(model, optimizer, config, mesh, state)
    traced = step.trace(state, batch_shapes(config, mesh))
    figures = summarize_program(traced.lower().compile(), matrix_flops(traced.jaxpr.jaxpr)) | note
    print(f"{mesh.size} x {mesh.devices.flat[0].device_kind}, batch {config.train.batch_size}")
    for name, value in figures.items():
        print(f"  {name:34}{value}")
    return figures


def summarize_program(compiled: Any, flops: int) -> dict[str, str]:
    """Returns {quantity: text} of a compiled program with `flops` on all devices together."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "state and batch, a device": _gib(held),
        "temporary memory, a device": _gib(memory.temp_size_in_bytes),
        "peak memory, a device": _gib(held + memory.temp_size_in_bytes),
        "matrix products, FLOP a step": f"{flops:.3g}, all devices",
        "collectives in the program": _count_collectives(compiled),
    }


def _count_collectives(compiled: Any) -> str:
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # XLA cannot print some fused operations of libtpu
        return "unknown: the compiled program cannot be printed"
    names = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    counts = sorted(collections.Counter(names).items())
    return ", ".join(f"{count} {name}" for name, count in counts) or "none"


def matrix_flops(jaxpr: Any) -> int:
    """Counts the floating-point operations of matrix products, including recomputation.

    The compiler's own count includes the body of a loop, such as the layers of a tower, only once.
    """
    total = 0
    for equation in jaxpr.eqns:
        inner = [matrix_flops(x) for x in _nested_jaxprs(equation.params)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            terms = math.prod(left[axis] for axis in contracted)
            total += 2 * terms * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "cond":  # one branch runs
            total += max(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)  # length of a scan
    return total


def _nested_jaxprs(params: Mapping[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(x, "jaxpr", x) for x in leaves if hasattr(x, "eqns")]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _find_devices(topology: str) -> Any:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server outside the cloud
    try:
        return topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    except Exception as error:  # libtpu has no common type
        hint = "such as v6e:2x4" if find_spec("libtpu") else "needs pip install libtpu"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--topology={topology}: {reason} ({hint})") from None


def batch_shapes(config: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and shardings of a batch, see `training_batches`."""
    size, model = config.train.batch_size, config.model
    side = model.vision.image_size
    shapes = {
        "ids": ((size, model.max_words), jnp.int32),
        "text_mask": ((size, model.max_words), jnp.bool_),
        "frames": ((size, model.max_frames, side, side, 3), jnp.uint8),
        "frame_mask": ((size, model.max_frames), jnp.bool_),
        "video": ((size,), jnp.int32),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, np.dtype(kind), sharding=sharding.over_batch(mesh))
        for name, (shape, kind) in shapes.items()
    }
