"""Measures the training step: time, videos per second, memory, use of the device, against PyTorch.

    python benchmarks/train_step.py --model=b32 --batch=4,8 --torch

    python benchmarks/train_step.py --model=b32 --batch=300 --dtype=bfloat16 --torch

The second line is for a GPU: see gpu.py.

Uses random weights, random frames, all devices, and the loss and AdamW of the default config. With
--torch the plain PyTorch of torch_xclip.py, compiled on a GPU, starts from the same weights and
alternates with JAX, in a process of its own. Writes results/NAME_DEVICE.json after each batch size.
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import results

from xclip_jax import sharding
from xclip_jax.allocator import use_huge_pages
from xclip_jax.config import BACKBONES, get_config
from xclip_jax.fitting import fit_step
from xclip_jax.models import ModelConfig, XClip, read_model_config
from xclip_jax.optimizer import make_optimizer
from xclip_jax.train import check_batch_sizes, compile_training, trace_with

TIMED_STEPS, SCHEDULE_STEPS = 2, 1000


class Side(Protocol):
    """One of the programs that alternate."""

    def step(self) -> Any:
        """Runs the program once and waits for the device."""


def make_config(args: argparse.Namespace, backbone: str, batch_size: int) -> Any:
    """Returns the default config with the settings of the command line."""
    config = get_config()
    config.model.vision.patch_size = BACKBONES[f"vit_{backbone}"]
    config.model.update(dtype=args.dtype, max_frames=args.frames, remat=args.remat)
    config.train.update(batch_size=batch_size, micro_batch=args.micro_batch)
    return config


def random_batch(c: ModelConfig, count: int) -> dict[str, np.ndarray]:
    """Returns a batch as data/pipeline.py makes it: no padded frames, texts of at least 5 words."""
    rng = np.random.default_rng(0)
    side, num_frames, num_words = c.vision.image_size, c.max_frames, c.max_words
    lengths_Tx1 = rng.integers(5, num_words + 1, (count, 1))
    end = c.text.vocab_size - 1
    ids = rng.integers(0, end, (count, num_words), np.int32)
    ids[np.arange(count), lengths_Tx1[:, 0] - 1] = end
    return {
        "ids": ids,
        "text_mask": np.arange(num_words) < lengths_Tx1,
        "frames": rng.integers(0, 256, (count, num_frames, side, side, 3), np.uint8),
        "frame_mask": np.ones((count, num_frames), bool),
        "video": np.arange(count, dtype=np.int32),
    }


class JaxStep:
    """The compiled training step on all devices."""

    def __init__(self, config: Any, model: XClip, batch: dict[str, np.ndarray]) -> None:
        mesh = sharding.make_mesh()
        check_batch_sizes(config, mesh)
        _, optimizer = make_optimizer(config.optimizer, SCHEDULE_STEPS)
        init, _ = compile_training(model, optimizer, config, mesh)
        self.state = init()
        self.batch = sharding.shard_batch(batch, mesh)
        trace = trace_with(model, optimizer, config, mesh)
        chosen = fit_step(trace, model.config, config, mesh)
        self.settings, self.compiled = chosen.settings, chosen.compiled
        print(f"{chosen.settings}: {chosen.memory}", flush=True)
        self.initial_params = jax.tree.map(np.array, self.state.params)

    def step(self) -> float:
        """Updates the state once and returns the loss."""
        self.state, metrics = jax.block_until_ready(self.compiled(self.state, self.batch))
        return float(metrics["loss"])

    def peak_bytes(self) -> tuple[int, str]:
        """Returns peak memory and its source: the device for this process, or the compiler."""
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"], "device"
        m = self.compiled.memory_analysis()  # donated buffers count once
        held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        return held + m.temp_size_in_bytes, "compiler"


class TorchStep:
    """PyTorch's training step, in a process of its own with the memory settings of any program."""

    def __init__(
        self, model: XClip, ours: JaxStep, config: Any, *, batch: dict[str, np.ndarray], dtype: str
    ) -> None:
        tunables = os.environ.pop("GLIBC_TUNABLES", None)  # those of allocator.py are ours
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        fields, optimizer = dataclasses.asdict(model.config), SimpleNamespace(**config.optimizer)
        inputs = fields, ours.initial_params, optimizer
        self.pool.submit(start_torch, *inputs, batch=batch, dtype=dtype).result()
        if tunables is not None:
            os.environ["GLIBC_TUNABLES"] = tunables

    def run(self, method: str, *arguments: Any) -> Any:
        """Returns the result of a method of the other process's Trainer."""
        return self.pool.submit(run_torch, method, *arguments).result()

    def step(self) -> None:
        """Updates the state once."""
        self.run("step")

    def close(self) -> None:
        """Ends the process."""
        self.pool.shutdown()


def start_torch(*inputs: Any, **options: Any) -> None:
    """Makes the Trainer of this process."""
    import torch
    import torch_xclip

    torch.set_num_threads(os.cpu_count() or 1)
    _trainers.append(torch_xclip.Trainer(*inputs, **options))


def run_torch(method: str, *arguments: Any) -> Any:
    """Returns the result of a method of this process's Trainer, a tensor as a number."""
    result = getattr(_trainers[0], method)(*arguments)
    return result.item() if hasattr(result, "item") else result


_trainers: list[Any] = []


def step_flops(c: ModelConfig, count: int) -> int:
    """Returns the floating-point operations of a step: 3 x the matrix products of a forward pass.

    A Transformer of width E over L tokens needs, per token and layer, 2 x 12 E^2 (queries, keys,
    values and output 4 E^2, the MLP 8 E^2) and 2 x 2 L E (scores, and weights x values). The patch
    embedding adds 2 x 3 x size^2 x E per patch, a projection 2 E D. The backward pass costs twice
    the forward pass. Recomputation, similarities and the optimizer are not counted.
    """
    vision, text, dim, frames, words = c.vision, c.text, c.embed_dim, c.max_frames, c.max_words
    patches, width = (vision.image_size // vision.patch_size) ** 2, vision.width
    image = patches * 2 * 3 * vision.patch_size**2 * width + 2 * width * dim
    image += _transformer_flops(vision.layers, width, patches + 1)
    if vision.pool == "class_token":  # for patches, the last block makes queries, keys, values
        image -= patches * (18 * width**2 + 4 * (patches + 1) * width)
    sentence = 2 * words * text.width * dim
    sentence += _transformer_flops(text.layers, text.width, words)
    temporal = _transformer_flops(c.temporal.layers, dim, frames)
    return 3 * count * (frames * image + sentence + temporal)


def _transformer_flops(layers: int, width: int, length: int) -> int:
    return layers * length * (24 * width**2 + 4 * length * width)


class MatrixProduct:
    """A large square product on one device, the reference for the device's peak rate."""

    def __init__(self, dtype: str) -> None:
        self.size = 2048 if jax.default_backend() == "cpu" else 8192
        self.rates = []
        self.a = jnp.asarray(np.random.default_rng(0).standard_normal((self.size,) * 2), dtype)
        self.product = jax.jit(lambda a: a @ a)
        jax.block_until_ready(self.product(self.a))

    def step(self) -> None:
        """Times five products."""
        for _ in range(5):
            seconds, _ = results.measure_seconds(lambda: self.product(self.a))
            self.rates.append(2 * self.size**3 / seconds)

    def peak_flops(self) -> float:
        """Returns FLOP/s of all devices at the rate of the fastest product so far."""
        return max(self.rates) * len(jax.devices())


def measure(
    args: argparse.Namespace, backbone: str, batch_size: int, *, product: MatrixProduct
) -> results.Row:
    """Returns the measurements of one backbone and batch size."""
    config = make_config(args, backbone, batch_size)
    model = XClip(read_model_config(config.model))
    batch = random_batch(model.config, batch_size)
    ours = JaxStep(config, model, batch)
    sides: dict[str, Any] = {"product": product, "ours": ours}
    if args.torch:
        sides["torch"] = theirs = TorchStep(model, ours, config, batch=batch, dtype=args.dtype)
        tolerance = 0.05 if args.dtype == "bfloat16" else 0.005  # TF32 on a GPU
        np.testing.assert_allclose(ours.step(), theirs.run("loss"), rtol=tolerance)
    times = alternate(sides, args.repeats)
    step_time = statistics.median(row["ours"] for row in times)
    flops = step_flops(model.config, batch_size) / step_time
    peak_bytes, source = ours.peak_bytes()
    row = {
        "model": backbone,
        "dtype": args.dtype,
        "remat": ours.settings.remat,
        "micro_batch": ours.settings.micro_batch,
        "batch": batch_size,
        "step_s": step_time,
        "videos_per_s": batch_size / step_time,
        "tflops": flops / 1e12,
        "mfu": flops / product.peak_flops(),
        "peak_gib": peak_bytes / 2**30,
        "peak_from": source,
    }
    if args.torch:
        torch_peak = theirs.run("peak_bytes")
        row["torch_step_s"] = statistics.median(row["torch"] for row in times)
        row["torch_product_tflops"] = theirs.run("product_flops", product.size) / 1e12
        row["torch_peak_gib"] = torch_peak and torch_peak / 2**30
        row["ours/torch"] = statistics.median(row["ours"] / row["torch"] for row in times)
        theirs.close()
    return row


def alternate(sides: dict[str, Side], repeats: int) -> list[dict[str, float]]:
    """Returns {side: seconds per step} of each repeat.

    The first step of a turn is not timed, because the memory that the other side used has to be
    allocated again.
    """
    times = []
    for repeat in range(repeats):
        row = {}
        for name, side in sides.items():
            side.step()
            seconds, _ = results.measure_seconds(
                lambda side=side: [side.step() for _ in range(TIMED_STEPS)]
            )
            row[name] = seconds / TIMED_STEPS
        times.append(row)
        print(repeat, {name: round(value, 4) for name, value in row.items()}, flush=True)
    return times


def parse_arguments() -> argparse.Namespace:
    """Returns the command-line arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="b32", help="b32, b16 or b32,b16")
    parser.add_argument("--batch", default="4,8", help="batch sizes, in rising order")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--micro_batch", type=int, help="default: by the memory")
    parser.add_argument("--remat", choices=("auto", "none", "dots", "layers"), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--torch", action="store_true", help="also measure PyTorch")
    parser.add_argument("--name", default="train_step", help="prefix of the results file")
    args = parser.parse_args()
    if not {f"vit_{model}" for model in args.model.split(",")} <= BACKBONES.keys():
        parser.error(f"--model={args.model}: must be b32, b16 or b32,b16")
    if args.torch and args.micro_batch:
        parser.error("--micro_batch cannot be combined with --torch, which has no gradient caching")
    return args


def main() -> None:
    """Prints the table after each batch size."""
    args = parse_arguments()
    if args.torch:  # JAX and PyTorch share a GPU
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    product, rows, path = MatrixProduct(args.dtype), [], None
    for backbone, batch in itertools.product(args.model.split(","), args.batch.split(",")):
        rows.append(measure(args, backbone, int(batch), product=product))
        arguments = {**vars(args), "peak_tflops": product.peak_flops() / 1e12}
        path = results.write(args.name, arguments, rows)
        print(results.format_table(rows), flush=True)
    print(f"peak {product.peak_flops() / 1e12:.3g} TFLOP/s in a matrix product; written to {path}")


if __name__ == "__main__":
    use_huge_pages()  # as training does
    main()
