"""Compiles the training step without running it: memory, work and communication in advance.

    python -m xclip_jax.main --config=configs/demo.py --compile_only
    python -m xclip_jax.main --config=configs/demo.py --compile_only --topology=v6e:2x4

With the libtpu wheel (`pip install libtpu`) the second command compiles for a TPU slice on
any machine. A model of CLIP's size takes minutes.
"""

import collections
import dataclasses
import math
import os
import re
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from xclip_jax import sharding
from xclip_jax.checkpoint import model_folder
from xclip_jax.cli import InputError, first_line
from xclip_jax.config import RunConfig
from xclip_jax.fitting import (
    Attempt,
    Settings,
    candidates,
    device_memory,
    held_bytes,
    peak_bytes,
    try_settings,
)
from xclip_jax.models import XClip
from xclip_jax.optimizer import make_optimizer
from xclip_jax.train import check_batch_sizes, configure_model, trace_with

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
CLIP_VOCABULARY = 49408
SCHEDULE_STEPS = 1000  # any number: the program does not depend on it


def compile_only(config: RunConfig, topology: str = "") -> dict[str, str]:
    """Compiles the training step of a config, prints and returns {quantity: text}.

    Automatic settings are tried until the step fits, in a table of one row each.

    Args:
        config: the run's config; its data is not read.
        topology: generation and shape of a TPU slice, such as v4:2x2x2, v5e:2x4, v5p:2x2x1 or
            v6e:4x4; "": the devices of this machine.

    Raises InputError if the topology does not exist, libtpu is not installed, or the step does not
    fit into the devices' memory: the message has settings with which it does.
    """
    mesh = _make_mesh(config, topology)
    check_batch_sizes(config, mesh)
    vocabulary = config.model.text.vocab_size
    model = configure_model(config, vocabulary or CLIP_VOCABULARY)
    if topology and model.dtype == "auto":
        model = dataclasses.replace(model, dtype="bfloat16")
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    print(f"{devices}, batch {config.train.batch_size}, {model.compute_dtype}")
    chosen, work = _try_settings(config, XClip(model), mesh)
    held, peak = held_bytes(chosen.compiled), peak_bytes(chosen.compiled)
    figures = {
        "settings": str(chosen.settings),
        "state and batch, a device": f"{held / 2**30:.2f} GiB",
        "temporary memory, a device": f"{(peak - held) / 2**30:.2f} GiB",
        "peak memory, a device": f"{peak / 2**30:.2f} GiB",
        "matrix products, FLOP a step": f"{work:.3g}, all devices",
        "collectives in the program": _count_collectives(chosen.compiled),
    }
    clip = config.init.clip
    if clip and not (model_folder(clip) / "model.json").is_file():
        figures["encoders"] = f"as the config says: there is no model in {clip}"
    if not vocabulary:
        figures["vocabulary"] = f"{CLIP_VOCABULARY} as CLIP's; training takes the tokenizer's"
    for name, value in figures.items():
        print(f"  {name:34}{value}")
    return figures


def _make_mesh(config: RunConfig, topology: str) -> Mesh:
    """Returns the mesh of a TPU slice, or of this machine's devices."""
    devices = None
    if topology:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server outside the cloud
        try:
            devices = topologies.get_topology_desc(topology, platform="tpu").devices
        except Exception as error:  # libtpu has no common type
            hint = "such as v6e:2x4" if find_spec("libtpu") else "needs pip install libtpu"
            raise InputError(f"--topology={topology}: {first_line(error)} ({hint})") from None
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)


def _try_settings(config: RunConfig, model: XClip, mesh: Mesh) -> tuple[Attempt, int]:
    """Prints the table of settings, returns the one that fits and its FLOP.

    Raises InputError if none does; where other settings than the config's fit, it names them.
    """
    size, remat, micro_batch = config.train.batch_size, config.model.remat, config.train.micro_batch
    _, optimizer = make_optimizer(config.optimizer, SCHEDULE_STEPS)
    trace, available = trace_with(model, optimizer, config, mesh), device_memory(mesh)
    least = matrix_flops(trace(Settings("none", 0)).jaxpr.jaxpr)
    print(f"  {'recomputation':15}{'micro-batch':13}{'FLOP':>6}  memory")

    def try_all(settings: list[Settings]) -> tuple[Attempt, int]:
        for attempt in try_settings(trace, settings, size, available):
            work, (recomputed, pairs) = matrix_flops(attempt.traced.jaxpr.jaxpr), attempt.settings
            fits = "fits" if attempt.fits else "does not fit"
            row = f"  {recomputed:15}{pairs or 'whole batch':<13}{work / least:6.2f}"
            print(f"{row}  {fits}: {attempt.memory}", flush=True)
        return attempt, work

    chosen, work = try_all(candidates(size, mesh.size, remat, micro_batch))
    if not chosen.fits and (remat != "auto" or isinstance(micro_batch, int)):
        problem = f"the training step does not fit: {chosen.memory}"
        other, _ = try_all(candidates(size, mesh.size))
        if other.fits:
            needed = other.memory.partition(" of ")[0]
            raise InputError(f"{problem}; it fits with {other.settings.flags}: {needed}")
    chosen.check()
    return chosen, work


def _count_collectives(compiled: Any) -> str:
    """Returns the number of each kind of collective in the program."""
    try:
        names = re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled.as_text())
    except jax.errors.JaxRuntimeError:  # XLA cannot print some fused operations of libtpu
        return "unknown: the compiled program cannot be printed"
    counts = sorted(collections.Counter(names).items())
    return ", ".join(f"{count} {name}" for name, count in counts) or "none"


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
