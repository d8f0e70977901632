"""Reports the memory of the loss, dense and in blocks, and of the step with gradient caching.

    python benchmarks/loss_memory.py

Nothing is run: the compiler states the memory and the collectives of each program, and no GPU is
needed. The loss and its gradient for features of width 512 are split over simulated CPU devices.
Targets: at most 4 GiB per device in blocks at 8,192 pairs on eight devices; at 32,768 pairs, a
device of 256 takes at most a third of the memory of a device of 64. The B/32 step of 300 videos is
on one device. Target: micro-batches take at most a quarter of the plain step's memory. With
--torch, PyTorch's dense loss and the loss in blocks are run on 512 pairs, each in its own process,
and their peak memory above the features is measured. Writes results/loss_memory_cpu.json.
"""

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results

from xclip_jax import sharding
from xclip_jax.config import get_config
from xclip_jax.loss import LossOptions, loss_of_features
from xclip_jax.models import XClip, read_model_config
from xclip_jax.optimizer import make_optimizer
from xclip_jax.train import batch_shapes, compile_training

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from collectives import collective_bytes

DEVICES = 8
ALL_CELLS = 1 << 62  # as block_cells: everything in one block
MANY_PAIRS, MANY_DEVICES = 32768, (8, 64, 256)
PAIRS, STEP_PAIRS, MICRO_BATCHES = (2048, 8192), 300, (0, 60, 30)
RUN_PAIRS = 512
SCHEDULE_STEPS = 1000
Batch = dict[str, Any]


def default_model() -> tuple[Any, XClip]:
    """Returns the default config and its model."""
    config = get_config()
    return config, XClip(read_model_config(config.model))


def measure_loss(pairs: int, block_cells: int = 0, devices: int = DEVICES) -> results.Row:
    """Compiles the loss of features and its gradient for simulated devices."""
    config, model = default_model()
    mesh = sharding.make_mesh(devices)
    gradient = feature_gradient(model, mesh=mesh, block_cells=block_cells)
    compiled = jax.jit(gradient).lower(*loss_shapes(config.model, pairs, mesh)).compile()
    variant = "dense" if block_cells else "in blocks"
    return memory_row("loss", variant, pairs, devices=devices, compiled=compiled)


def feature_gradient(model: XClip, **options: Any) -> Callable:
    """Returns (parameters, features, batch) -> ((loss, accuracy), gradients)."""
    loss = functools.partial(loss_of_features, model, options=LossOptions(**options))
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def loss_shapes(model: Any, pairs: int, mesh: jax.sharding.Mesh) -> tuple[dict, tuple, Batch]:
    """Returns the shapes of (parameters, features, batch)."""
    words, frames, dim = model.max_words, model.max_frames, model.embed_dim
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.over_batch(mesh))
    shapes = (pairs, dim), (pairs, words, dim), (pairs, dim), (pairs, frames, dim)
    sentence, word, video, frame = (struct(shape, jnp.float32) for shape in shapes)
    features = sentence, word, None, video, frame, None  # without learned weights
    batch = {
        "text_mask": struct((pairs, words), jnp.bool_),
        "frame_mask": struct((pairs, frames), jnp.bool_),
        "video": struct((pairs,), jnp.int32),
    }
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    return {"clip": {"logit_scale": scale}}, features, batch


def measure_step(pairs: int, micro_batch: int) -> results.Row:
    """Compiles the training step of B/32 for one device."""
    config, model = default_model()
    config.train.update(batch_size=pairs, micro_batch=micro_batch)
    mesh = sharding.make_mesh(1)
    _, optimizer = make_optimizer(config.optimizer, SCHEDULE_STEPS)
    init, step = compile_training(model, optimizer, config, mesh)
    compiled = step.lower(init.eval_shape(), batch_shapes(config, mesh)).compile()
    variant = f"micro-batch {micro_batch}" if micro_batch else "plain"
    return memory_row("step", variant, pairs, devices=1, compiled=compiled)


def memory_row(
    program: str, variant: str, pairs: int, *, devices: int, compiled: jax.stages.Compiled
) -> results.Row:
    """Returns the compiler's figures for a program, in GiB per device.

    Of the collectives: the arrays that they yield.
    """
    memory, moved = compiled.memory_analysis(), collective_bytes(compiled.as_text())
    kinds = {"sent": "collective-permute", "gathered": "all-gather", "reduced": "all-reduce"}
    kinds |= {"exchanged": "all-to-all", "scattered": "reduce-scatter"}
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "program": program,
        "variant": variant,
        "pairs": pairs,
        "devices": devices,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "held_gib": (held - memory.alias_size_in_bytes) / 2**30,
        **{f"{name}_gib": moved.get(kind, 0) / 2**30 for name, kind in kinds.items()},
    }


def run_in_process(side: str) -> results.Row:
    """Runs the loss of random features and its gradient in a new process."""
    command = [sys.executable, __file__, f"--run={side}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    peak_mib, loss = json.loads(done.stdout)
    print(f"{side}: loss {loss:.5f}, {peak_mib:.0f} MiB above the features")
    return {
        "program": "loss, run",
        "variant": side,
        "pairs": RUN_PAIRS,
        "peak_gib": peak_mib / 1024,
    }


def run_side(side: str) -> tuple[float, float]:
    """Returns (peak MiB above the features, loss) of this process."""
    config, model = default_model()
    _, feature_shapes, batch_shapes = loss_shapes(config.model, RUN_PAIRS, sharding.make_mesh(1))
    rng = np.random.default_rng(0)
    features = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), feature_shapes)
    features = jax.tree.map(lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True), features)
    batch: Batch = {name: np.ones(x.shape, x.dtype) for name, x in batch_shapes.items()}
    batch["video"] = np.arange(RUN_PAIRS, dtype=np.int32)
    before = results.peak_mib()
    loss = run_torch(features, batch) if side == "torch" else run_jax(model, features, batch)
    return results.peak_mib() - before, loss


def run_jax(model: XClip, features: Any, batch: Batch) -> float:
    """Computes the loss in blocks and its gradient, returns the loss."""
    gradient = jax.jit(feature_gradient(model))
    params = {"clip": {"logit_scale": np.float32(0)}}
    (loss, _), _ = jax.block_until_ready(gradient(params, features, batch))
    return float(loss)


def run_torch(features: Any, batch: Batch) -> float:
    """Computes PyTorch's dense loss and its gradient, returns the loss."""
    import torch
    import torch_xclip

    tensors = [torch.from_numpy(x).requires_grad_() for x in jax.tree.leaves(features)]
    masks = [torch.from_numpy(batch[name]) for name in ("text_mask", "frame_mask")]
    sim_TxV = torch_xclip.similarity(*tensors, *masks)
    targets = torch.arange(RUN_PAIRS)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = cross_entropy(sim_TxV, targets) + cross_entropy(sim_TxV.T, targets)
    loss.backward()
    return loss.item()


def main() -> None:
    """Prints the table and compares it with the targets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", action="store_true", help="also run both losses")
    parser.add_argument("--run", choices=("ours", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES if args.run else max(MANY_DEVICES))
    if args.run:
        print(json.dumps(run_side(args.run)))
        return
    rows = [measure_loss(pairs, cells) for pairs in PAIRS for cells in (ALL_CELLS, 0)]
    many = [measure_loss(MANY_PAIRS, devices=devices) for devices in MANY_DEVICES]
    steps = [measure_step(STEP_PAIRS, micro_batch) for micro_batch in MICRO_BATCHES]
    print(results.format_table(rows + many + steps))
    print(f"in blocks at {PAIRS[-1]}: {rows[-1]['temporary_gib']:.2f} GiB per device (target 4)")
    ratio = many[-1]["temporary_gib"] / many[-2]["temporary_gib"]
    print(f"{MANY_PAIRS} pairs: 256 devices take {ratio:.2f} of the memory of 64 (target 0.33)")
    for row in steps[1:]:
        ratio = row["temporary_gib"] / steps[0]["temporary_gib"]
        print(f"{row['variant']}: {ratio:.3f} of the plain step's memory (target 0.25)")
    rows += many + steps
    if args.torch:
        rows += map(run_in_process, ("torch", "ours"))
    arguments = {"pairs": PAIRS, "step_pairs": STEP_PAIRS, "micro_batches": MICRO_BATCHES}
    print(results.write("loss_memory", arguments, rows))


if __name__ == "__main__":
    main()
