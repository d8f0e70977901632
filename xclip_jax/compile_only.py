"""Compiles the training step without running it: memory, work and communication beforehand.

    python -m xclip_jax.main --config=configs/demo.py --compile_only
    python -m xclip_jax.main --config=configs/demo.py --compile_only --topology=v6e:2x4

With the libtpu wheel (`pip install libtpu`) the second compiles for a TPU slice on any machine; a
model of CLIP's size takes minutes.
"""

import collections
import dataclasses
import math
import os
import re
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from xclip_jax import sharding
from xclip_jax.cli import InputError
from xclip_jax.models import XClip, read_model_config
from xclip_jax.train import check_batch_sizes, compile_step, configured_optimizer, state_shapes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
CLIP_VOCABULARY = 49408
SCHEDULE_STEPS = 1000  # of the schedule: it does not change the program's size


def compile_only(config, topology=""):
    """Compiles the step of a config and prints what the compiler says of it.

    Args:
        topology: generation and shape of a TPU slice, such as v4:2x2x2, v5e:2x4, v5p:2x2x1,
            v6e:4x4; "": the devices here.

    Raises:
        InputError: there is no such topology, or libtpu is not installed.
    """
    devices = _devices(topology) if topology else None
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    check_batch_sizes(config.train, mesh)
    model_config = read_model_config(config.model)
    assumed = not model_config.text.vocab_size
    if assumed:
        text = dataclasses.replace(model_config.text, vocab_size=CLIP_VOCABULARY)
        model_config = dataclasses.replace(model_config, text=text)
    model = XClip(model_config)
    _, optimizer = configured_optimizer(config.optimizer, SCHEDULE_STEPS)
    state = state_shapes(model, optimizer, mesh)
    step = compile_step(model, optimizer, config, mesh, state)
    traced = step.trace(state, batch_shapes(config, mesh))
    compiled = traced.lower().compile()
    report = summarize_program(compiled, matrix_flops(traced.jaxpr.jaxpr))
    if assumed:
        report["vocabulary"] = f"{CLIP_VOCABULARY} as CLIP's: the tokenizer of the data decides"
    print(f"{mesh.size} x {mesh.devices.flat[0].device_kind}, batch {config.train.batch_size}")
    for name, value in report.items():
        print(f"  {name:34}{value}")
    return report


def summarize_program(compiled, flops):
    """What the compiler says of a program, {what: text}; `flops`: of all devices."""
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "state and batch, a device": _gib(kept),
        "temporary memory, a device": _gib(memory.temp_size_in_bytes),
        "peak memory, a device": _gib(kept + memory.temp_size_in_bytes),
        "matrix products, FLOP a step": f"{flops:.3g}, all devices",
        "collectives in the program": _collectives(compiled),
    }


def _collectives(compiled):
    """How many of each kind the program has."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # libtpu fuses some in a way that XLA here cannot read
        return "unknown: the compiled program cannot be printed"
    found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    counts = collections.Counter(found)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def matrix_flops(jaxpr):
    """Floating-point operations of a program's matrix products, recomputation included.

    The compiler's own count takes the body of a loop, such as a tower's layers, only once.
    """
    total = 0
    for equation in jaxpr.eqns:
        inner = [matrix_flops(x) for x in _programs_in(equation.params)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            terms = math.prod(left[axis] for axis in contracted)
            total += 2 * terms * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "cond":  # one of its branches runs
            total += max(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)  # length: of a scan
    return total


def _programs_in(params):
    """The jaxprs among an equation's parameters."""
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(x, "jaxpr", x) for x in leaves if hasattr(x, "eqns")]


def _gib(size):
    return f"{size / 2**30:.2f} GiB"


def _devices(topology):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server here
    try:
        return topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    except Exception as error:  # libtpu has no one type
        hint = "such as v6e:2x4" if find_spec("libtpu") else "needs pip install libtpu"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--topology={topology}: {reason} ({hint})") from None


def batch_shapes(config, mesh):
    """Shapes of a batch, see data/pipeline.py."""
    size, model = config.train.batch_size, config.model
    side = model.vision.image_size
    shapes = {
        "ids": ((size, model.max_words), jnp.int32),
        "text_mask": ((size, model.max_words), jnp.bool_),
        "frames": ((size, model.max_frames, side, side, 3), jnp.uint8),
        "frame_mask": ((size, model.max_frames), jnp.bool_),
        "video": ((size,), jnp.int32),
    }
    spread = sharding.over_batch(mesh)
    return {
        k: jax.ShapeDtypeStruct(s, np.dtype(d), sharding=spread) for k, (s, d) in shapes.items()
    }
