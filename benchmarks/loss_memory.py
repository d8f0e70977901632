"""Memory of the loss, dense and in blocks, and of the step, plain and gradient-cached; no GPU.

    python benchmarks/loss_memory.py

Nothing is run: the compiler says what each program would take. The loss and its gradient on
features of 512 on eight fake CPU devices (targets: in blocks, at 8,192 pairs, under 4 GiB a
device); the B/32 step of 300 videos on one (a micro-batch takes under a quarter of the plain step).
With --torch, PyTorch's dense loss and ours in blocks are run on 512 pairs, each in a process of its
own, and their peak memory above the features is measured. Writes results/loss_memory_cpu.json.
"""

import argparse
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import results

from xclip_jax import compile_only, sharding
from xclip_jax.config import get_config
from xclip_jax.loss import Contrast
from xclip_jax.models import build_model, resolve
from xclip_jax.train import compile_step, configured_optimizer, state_shapes

DEVICES = 8
DENSE = 1 << 62  # cells a block: all of them
PAIRS, STEP_PAIRS, MICRO_BATCHES = (2048, 8192), 300, (0, 60, 30)
RUN_PAIRS = 512


def default_model():
    """(config, architecture, model) of the default config."""
    config = get_config()
    architecture = resolve(json.loads(config.model.to_json()))
    return config, architecture, build_model(architecture)


def loss_row(pairs, block_cells):
    """The loss of a batch of features and its gradient, split over the fake devices."""
    config, _, model = default_model()
    mesh = sharding.make_mesh(DEVICES)
    contrast = Contrast(model, mesh=mesh, block_cells=block_cells)
    gradient = jax.value_and_grad(contrast._loss, argnums=(0, 1), has_aux=True)
    compiled = jax.jit(gradient).lower(*_loss_shapes(config.model, pairs, mesh)).compile()
    way = "dense" if block_cells else "in blocks"
    return _row("loss", way, pairs, DEVICES, compiled)


def _loss_shapes(model, pairs, mesh):
    """(parameters, features, batch) as `Contrast._loss` wants them; no arrays."""
    words, frames, dim = model.max_words, model.max_frames, model.embed_dim
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.over_batch(mesh))
    shapes = (pairs, dim), (pairs, words, dim), (pairs, dim), (pairs, frames, dim)
    features = tuple(struct(shape, jnp.float32) for shape in shapes)
    batch = {
        "text_mask": struct((pairs, words), jnp.bool_),
        "frame_mask": struct((pairs, frames), jnp.bool_),
        "video": struct((pairs,), jnp.int32),
    }
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    return {"clip": {"logit_scale": scale}}, features, batch


def step_row(pairs, micro_batch):
    """The whole training step of B/32 on one device."""
    config, architecture, model = default_model()
    config.train.update(batch_size=pairs, micro_batch=micro_batch)
    mesh = sharding.make_mesh(1)
    _, optimizer = configured_optimizer(config.optimizer, compile_only.SCHEDULE_STEPS)
    state = state_shapes(model, architecture, optimizer, mesh)
    step = compile_step(model, optimizer, config, mesh, state)
    compiled = step.lower(state, compile_only.batch_shapes(config, mesh)).compile()
    way = f"micro-batch {micro_batch}" if micro_batch else "plain"
    return _row("step", way, pairs, 1, compiled)


def _row(program, way, pairs, devices, compiled):
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "program": program,
        "way": way,
        "pairs": pairs,
        "devices": devices,
        "temp_gib": memory.temp_size_in_bytes / 2**30,
        "kept_gib": (kept - memory.alias_size_in_bytes) / 2**30,
    }


def measured_row(side):
    """The loss of random features and its gradient, run in a process of its own."""
    command = [sys.executable, __file__, f"--run={side}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    peak_mib, loss = json.loads(done.stdout)
    print(f"{side}: loss {loss:.5f}, {peak_mib:.0f} MiB above the features")
    return {"program": "loss, run", "way": side, "pairs": RUN_PAIRS, "peak_gib": peak_mib / 1024}


def run_side(side):
    """(peak memory above the features in MiB, loss) of this process."""
    config, _, model = default_model()
    shapes = _loss_shapes(config.model, RUN_PAIRS, sharding.make_mesh(1))
    rng = np.random.default_rng(0)
    features = [rng.standard_normal(x.shape, np.float32) for x in shapes[1]]
    features = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in features]
    batch = {name: np.ones(x.shape, x.dtype) for name, x in shapes[2].items()}
    batch["video"] = np.arange(RUN_PAIRS, dtype=np.int32)
    before = results.peak_mib()
    run = {"ours": _run_ours, "torch": _run_torch}[side]
    loss = run(model, features, batch)
    return results.peak_mib() - before, loss


def _run_ours(model, features, batch):
    contrast = Contrast(model)
    gradient = jax.jit(jax.value_and_grad(contrast._loss, argnums=(0, 1), has_aux=True))
    params = {"clip": {"logit_scale": np.float32(0)}}
    (loss, _), _ = jax.block_until_ready(gradient(params, tuple(features), batch))
    return float(loss)


def _run_torch(_, features, batch):
    import torch
    import torch_xclip

    before = [torch.from_numpy(x).requires_grad_() for x in features]
    masks = [torch.from_numpy(batch[name]) for name in ("text_mask", "frame_mask")]
    sim_TxV = torch_xclip.similarity(*before, *masks)
    targets = torch.arange(RUN_PAIRS)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = cross_entropy(sim_TxV, targets) + cross_entropy(sim_TxV.T, targets)
    loss.backward()
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", action="store_true", help="run the loss of both sides too")
    parser.add_argument("--run", choices=("ours", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    if args.run:
        print(json.dumps(run_side(args.run)))
        return
    rows = [loss_row(pairs, cells) for pairs in PAIRS for cells in (DENSE, 0)]
    rows += [step_row(STEP_PAIRS, micro_batch) for micro_batch in MICRO_BATCHES]
    print(results.table(rows))
    blocks = next(r for r in rows if (r["way"], r["pairs"]) == ("in blocks", max(PAIRS)))
    print(f"in blocks at {max(PAIRS)}: {blocks['temp_gib']:.2f} GiB a device (target 4)")
    plain = next(r for r in rows if r["way"] == "plain")
    for row in rows[rows.index(plain) + 1 :]:
        share = row["temp_gib"] / plain["temp_gib"]
        print(f"{row['way']}: {share:.3f} of the plain step's temporary memory (target 0.25)")
    if args.torch:
        rows += map(measured_row, ("torch", "ours"))
    said = {"pairs": PAIRS, "step_pairs": STEP_PAIRS, "micro_batches": MICRO_BATCHES}
    print(results.write("loss_memory", said, rows))


if __name__ == "__main__":
    main()
