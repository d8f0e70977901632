"""The training step: time, videos a second, share of the device's peak, memory; against PyTorch.

    python benchmarks/train_step.py --model=b32 --batch=4,8 --torch

    python benchmarks/train_step.py --model=b32,b16 --batch=80,300 --dtype=bfloat16 --torch

The second line is for a GPU: both backbones at the batches of the release's scripts, meant to take
less than 8 minutes on a large one. It was written without one at hand.

Random weights, random frames, the default config's loss and AdamW, all devices. With --torch the
plain PyTorch of torch_xclip.py starts from the same weights; the two take turns in one run. Writes
results/NAME_DEVICE.json, after each batch size.
"""

import argparse
import itertools
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import results

from xclip_jax import sharding
from xclip_jax.config import BACKBONES, get_config
from xclip_jax.models import build_model, resolve
from xclip_jax.train import check_batch_sizes, compile_step, configured_optimizer, init_state

TURN, STEPS = 2, 1000  # timed steps of a turn; steps of the schedule


def configured(args, model, batch):
    """The default config with what the command line says."""
    config = get_config()
    config.model.vision.patch_size = BACKBONES[f"vit_{model}"]
    config.model.update(dtype=args.dtype, max_frames=args.frames)
    config.train.update(batch_size=batch, micro_batch=args.micro_batch)
    return config


def random_batch(architecture, count, seed=0):
    """A batch as data/pipeline.py gives it: all frames real, texts of 5 words and more."""
    rng = np.random.default_rng(seed)
    side, num_frames = architecture["vision"]["image_size"], architecture["max_frames"]
    num_words = architecture["max_words"]
    lengths_Tx1 = rng.integers(5, num_words + 1, (count, 1))
    ids = rng.integers(0, architecture["text"]["vocab_size"], (count, num_words), np.int32)
    return {
        "ids": ids,
        "text_mask": np.arange(num_words) < lengths_Tx1,
        "frames": rng.integers(0, 256, (count, num_frames, side, side, 3), np.uint8),
        "frame_mask": np.ones((count, num_frames), bool),
        "video": np.arange(count, dtype=np.int32),
    }


class Ours:
    """The real step on all devices, compiled; `step` returns when they are done."""

    def __init__(self, config, architecture, batch):
        mesh = sharding.make_mesh()
        check_batch_sizes(config.train, mesh)
        model = build_model(architecture)
        _, optimizer = configured_optimizer(config.optimizer, STEPS)
        self.state = init_state(model, architecture, optimizer, 0, mesh)
        self.batch = sharding.shard_batch(batch, mesh)
        step = compile_step(model, optimizer, config, mesh, self.state)
        self.compiled = step.lower(self.state, self.batch).compile()
        self.params = jax.tree.map(np.array, self.state.params)  # the first, for PyTorch

    def step(self):
        """One update; its loss."""
        self.state, metrics = jax.block_until_ready(self.compiled(self.state, self.batch))
        return float(metrics["loss"])

    def peak_bytes(self):
        """(bytes, who says so): the device, of this process so far; or else the compiler."""
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"], "device"
        m = self.compiled.memory_analysis()  # what is given up for the output counts once
        kept = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        return kept + m.temp_size_in_bytes, "compiler"


def step_flops(architecture, count):
    """Floating-point operations of a step: 3 x the forward pass's matrix products.

    A Transformer of width E over L tokens takes, a token and layer, 2 x 12 E^2 (queries, keys,
    values and output 4 E^2, the MLP 8 E^2) and 2 x 2 L E (scores, and weights x values). To that
    come the patch embedding, 2 x 3 x size^2 x E a patch, and the projections, 2 E D. The backward
    pass takes twice the forward pass. Recomputation, similarities and optimizer are not counted.
    """
    vision, text, dim = (architecture[name] for name in ("vision", "text", "embed_dim"))
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    images, words = count * architecture["max_frames"], architecture["max_words"]
    width = vision["width"]
    a_image = patches * 2 * 3 * vision["patch_size"] ** 2 * width + 2 * width * dim
    a_image += _transformer_flops(vision["layers"], width, patches + 1)
    a_text = (
        _transformer_flops(text["layers"], text["width"], words) + 2 * words * text["width"] * dim
    )
    temporal = _transformer_flops(
        architecture["temporal"]["layers"], dim, architecture["max_frames"]
    )
    return 3 * (images * a_image + count * (a_text + temporal))


def _transformer_flops(layers, width, length):
    return layers * length * (24 * width**2 + 4 * length * width)


class Product:
    """A large square product of this type on one device: what the device can do at best."""

    def __init__(self, dtype):
        self.size = 2048 if jax.default_backend() == "cpu" else 8192
        self.rates = []
        self.a = jnp.asarray(np.random.default_rng(0).standard_normal((self.size,) * 2), dtype)
        self.product = jax.jit(lambda a: a @ a)
        jax.block_until_ready(self.product(self.a))

    def step(self):
        """A few products, each timed."""
        for _ in range(5):
            took = seconds(lambda: jax.block_until_ready(self.product(self.a)))
            self.rates.append(2 * self.size**3 / took)

    def peak_flops(self):
        """FLOP/s of all devices, by the fastest product so far."""
        return max(self.rates) * len(jax.devices())


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(args, model, batch_size, product):
    """A row of the table."""
    config = configured(args, model, batch_size)
    architecture = resolve(json.loads(config.model.to_json()))
    batch = random_batch(architecture, batch_size)
    ours = Ours(config, architecture, batch)
    sides = {"product": product, "ours": ours}
    if args.torch:
        sides["torch"] = torch_side(args, config, architecture, ours, batch)
    rounds = take_turns(sides, args.repeats)
    step_time = statistics.median(row["ours"] for row in rounds)
    flops = step_flops(architecture, batch_size) / step_time
    peak_bytes, source = ours.peak_bytes()
    row = {
        "model": model,
        "dtype": args.dtype,
        "batch": batch_size,
        "step_s": step_time,
        "videos_per_s": batch_size / step_time,
        "tflops": flops / 1e12,
        "mfu": flops / product.peak_flops(),
        "peak_gib": peak_bytes / 2**30,
        "peak_from": source,
    }
    return row | (compared(rounds, sides["torch"]) if args.torch else {})


def torch_side(args, config, architecture, ours, batch):
    """PyTorch's trainer, once its loss is seen to be ours."""
    import torch
    import torch_xclip

    torch.set_num_threads(os.cpu_count())
    trainer = torch_xclip.Trainer(architecture, ours.params, config.optimizer, batch, args.dtype)
    with torch.no_grad():
        theirs = trainer.loss().item()
    tolerance = 0.05 if args.dtype == "bfloat16" else 0.005  # TF32 on a GPU
    np.testing.assert_allclose(ours.step(), theirs, rtol=tolerance)
    return trainer


def take_turns(sides, repeats):
    """[{side: seconds of a step}] of `repeats` rounds, steps running back to back as in training.

    The first step of a turn is not timed: memory that was idle meanwhile must be had again.
    """
    rounds = []
    for number in range(repeats):
        row = {}
        for name, side in sides.items():
            side.step()
            row[name] = seconds(lambda side=side: [side.step() for _ in range(TURN)]) / TURN
        rounds.append(row)
        print(number, {name: round(value, 4) for name, value in row.items()}, flush=True)
    return rounds


def compared(rounds, trainer):
    """What the table says of PyTorch."""
    peak_bytes = trainer.peak_bytes()
    return {
        "torch_step_s": statistics.median(row["torch"] for row in rounds),
        "torch_peak_gib": peak_bytes and peak_bytes / 2**30,
        "ours/torch": statistics.median(row["ours"] / row["torch"] for row in rounds),
    }


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="b32", help="b32, b16 or b32,b16")
    parser.add_argument("--batch", default="4,8", help="sizes, rising: peak memory only rises")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--micro_batch", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--torch", action="store_true", help="measure PyTorch too")
    parser.add_argument("--name", default="train_step", help="of the results")
    args = parser.parse_args()
    if not {f"vit_{model}" for model in args.model.split(",")} <= BACKBONES.keys():
        parser.error(f"--model={args.model}: must be of b32, b16")
    if args.torch and args.micro_batch:
        parser.error("--micro_batch: the PyTorch side has no gradient caching")
    return args


def main():
    args = arguments()
    if args.torch:  # both share a GPU: neither may take it all
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    product, rows = Product(args.dtype), []
    for model, batch in itertools.product(args.model.split(","), args.batch.split(",")):
        rows.append(measure(args, model, int(batch), product))
        said = {**vars(args), "peak_tflops": product.peak_flops() / 1e12}
        path = results.write(args.name, said, rows)
        print(results.table(rows), flush=True)
    print(f"peak {product.peak_flops() / 1e12:.3g} TFLOP/s by a large product; written to {path}")


if __name__ == "__main__":
    main()
