"""Measures the input pipeline: frames per second by threads and worker processes, cores per GPU.

    python benchmarks/input_pipeline.py

Writes clips of 224-pixel frames with the spectrum of photographs, 22 kB each, to a temporary
folder, and reads them as training does. Each row is the best of several repeats, taken in turn:
other programs only slow them down. `bare` only decodes the same bytes: `ours` with as many cores
should reach 0.8 of it. --torch also times a plain PyTorch DataLoader on the same clips, with Pillow
and one worker process per core.

Rates on other numbers of cores follow Amdahl's law: a clip takes serial + parallel / (cores x h)
seconds. h is the speed of each of two busy cores relative to one alone, by bare decoding: below 1
where they share a clock or caches. What reading loses on two cores beyond that gives `serial`. It
is at least the time of all but decoding, as most of that holds Python's lock. With --step_s and
--step_batch, a training step of one GPU, the number of cores that feed that GPU is printed, by
default for the B/32 step measured on an H200.
"""

import argparse
import functools
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import results

from xclip_jax.data import pipeline, readers
from xclip_jax.data.builder import Dataset, DatasetSettings, PendingRecord, write_dataset
from xclip_jax.data.pipeline import Readers, TrainingPairs, training_batches
from xclip_jax.data.preprocess import FrameFormat, decode_jpeg, encode_jpeg
from xclip_jax.data.text import learn_tokenizer
from xclip_jax.data.tokenizer import Tokenizer

CLIPS, FRAMES, BATCH, THREADS, SIDE, PICTURES = 200, 12, 40, 4, 224, 64
STEP = results.FOLDER / "train_step_b32_nvidia_h200.json"


def make_pictures() -> list[bytes]:
    """Returns JPEGs of noise whose amplitude falls with frequency, as that of photographs does."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    frequency[0, 0] = np.inf  # no mean

    def draw() -> bytes:
        noise = np.fft.fft2(rng.normal(size=(3, SIDE, SIDE)))
        pixels = np.fft.ifft2(noise / frequency**1.8).real
        pixels = (128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)
        return encode_jpeg(pixels.transpose(1, 2, 0))

    return [draw() for _ in range(PICTURES)]


def make_dataset(folder: str) -> Dataset:
    """Writes CLIPS clips of FRAMES frames, returns the data set."""
    rng, pictures = np.random.default_rng(0), make_pictures()

    def make_record(number: int) -> dict:
        jpegs = [pictures[n] for n in rng.integers(PICTURES, size=FRAMES)]
        captions = [f"clip number {number}"]
        return {"id": str(number), "captions": captions, "frames": jpegs, "times": [*range(FRAMES)]}

    clips = [PendingRecord(functools.partial(make_record, n), 1, str(n)) for n in range(CLIPS)]
    write_dataset(folder, {"train": clips}, DatasetSettings(image_size=SIDE))
    return Dataset(folder)


def decode_only(jpegs: list[list[bytes]], chosen: Readers, size: int) -> Iterator[None]:
    """Yields after the decoding of each `size` clips."""

    def decode(clip: list[bytes]) -> list[np.ndarray]:
        return list(map(decode_jpeg, clip))

    with ThreadPoolExecutor(chosen.threads) as pool:
        while True:
            list(pool.map(decode, jpegs[:size]))
            yield


def read_torch(jpegs: list[list[bytes]], tokenizer: Tokenizer, _: Readers, size: int) -> Any:
    """Yields batches of a DataLoader on a map-style Dataset."""
    import torch
    from PIL import Image

    class Clips(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            ids_1xW, mask_1xW = tokenizer([f"clip number {i % CLIPS}"])
            images = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs[i % CLIPS]]
            return ids_1xW[0], mask_1xW[0], np.stack([np.asarray(image) for image in images])

    yield from torch.utils.data.DataLoader(Clips(), size, num_workers=readers.count_cores())


class Side:
    """One row: a way to read, on the first `cores` cores."""

    def __init__(self, name: str, open_batches: Callable, chosen: Readers, cores: int) -> None:
        self.name, self.open_batches, self.chosen, self.cores = name, open_batches, chosen, cores
        self.rates: list[float] = []

    def measure(self) -> None:
        """Adds a rate, in clips per second."""
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, sorted(allowed)[: self.cores])  # inherited by threads started now
        try:
            with mock.patch.object(pipeline, "decode_jpeg", self.decode_jpeg):
                self.rates.append(readers.measure_rate(self.open_batches, self.chosen, BATCH))
        finally:
            os.sched_setaffinity(0, allowed)

    def decode_jpeg(self, data: bytes, out: np.ndarray) -> np.ndarray:
        """Decodes a frame, except in the row without decoding."""
        return out if self.name == "undecoded" else decode_jpeg(data, out)

    def row(self) -> results.Row:
        """Returns the best rate, per second and per second and busy core."""
        clips, (threads, workers) = max(self.rates), self.chosen
        busy = min(self.cores, threads * max(1, workers))
        rates = {"clips_s": clips, "frames_s": clips * FRAMES}
        row = {"side": self.name, "threads": threads, "workers": workers, "cores": self.cores}
        return row | rates | {"frames_s_core": clips * FRAMES / busy}


def make_sides(dataset: Dataset, *, torch: bool) -> list[Side]:
    """Returns all rows to measure."""
    pairs = TrainingPairs(dataset, "train", "all")
    jpegs = [record["frames"] for record in dataset.clips("train")]
    tokenizer = learn_tokenizer(["clip number 1"], max_words=32)

    def open_batches(chosen: Readers, size: int) -> Any:
        shapes = size, FRAMES, FrameFormat(SIDE)
        return training_batches(pairs, tokenizer, *shapes, seed=0, readers=chosen)

    cores = readers.count_cores()
    bare = functools.partial(decode_only, jpegs)
    counts = sorted({1, 2, THREADS, cores, *(1 << n for n in range(cores.bit_length()))})
    workers = min(cores, readers.WORKERS)
    sides = []
    for few in sorted({1, 2, cores}):
        sides.append(Side("bare", bare, Readers(THREADS), few))
        sides.append(Side("ours", open_batches, Readers(THREADS), few))
    others = [Readers(threads) for threads in counts if threads != THREADS]
    others.append(Readers(cores // workers, workers))
    sides += [Side("ours", open_batches, chosen, cores) for chosen in others]
    sides.append(Side("undecoded", open_batches, Readers(1), cores))
    if torch:
        loader = functools.partial(read_torch, jpegs, tokenizer)
        sides.append(Side("torch", loader, Readers(1, cores), cores))
    return sides


def extrapolate(rows: list[results.Row], step_s: float, step_frames: int) -> results.Row:
    """Returns the rate on 16 cores and the cores per GPU, see above."""
    by_cores = {
        (row["side"], row["cores"]): row["clips_s"] for row in rows if row["threads"] == THREADS
    }
    one, bare = by_cores["ours", 1], by_cores["bare", 1]
    speed = min(1, by_cores["bare", 2] / bare / 2)
    lost = max(0, 1 - by_cores["ours", 2] / one / 2 / speed)
    undecoded = next(1 / row["clips_s"] for row in rows if row["side"] == "undecoded")
    serial = min(max(lost / (1 - lost) / one, undecoded), 1 / one)
    parallel, needed = (1 / one - serial) / speed, step_s / step_frames * FRAMES
    return {
        "clip_ms_on_one_core": 1e3 / one,
        "h": speed,
        "lost_on_two_cores": lost,
        "undecoded_ms": undecoded * 1e3,
        "serial_ms": serial * 1e3,
        "frames_s_16_cores": FRAMES / (serial + parallel / 16),
        "frames_s_limit": FRAMES / serial,
        "gpu_frames_s": step_frames / step_s,
        "cores_per_gpu": parallel / (needed - serial) if needed > serial else math.inf,
    }


def read_step(step_s: float, step_batch: int) -> tuple[float, int]:
    """Returns the seconds and frames of a step, of the measured B/32 step if `step_s` is 0."""
    if step_s:
        return step_s, step_batch * FRAMES
    content = json.loads(STEP.read_text())
    row = content["rows"][0]
    return row["step_s"], row["batch"] * content["arguments"]["frames"]


def main() -> None:
    """Prints the rates, their extrapolation and the cores that feed one GPU."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", action="store_true", help="also time PyTorch's DataLoader")
    parser.add_argument("--quick", action="store_true", help="2 repeats, within 90 s")
    parser.add_argument("--step_s", type=float, default=0, help="seconds of one GPU's step")
    parser.add_argument("--step_batch", type=int, default=300, help="clips of that step")
    args = parser.parse_args()
    step = read_step(args.step_s, args.step_batch)
    with tempfile.TemporaryDirectory() as folder:
        sides = make_sides(make_dataset(folder), torch=args.torch)
        for _ in range(2 if args.quick else 7):
            for side in sides:
                side.measure()
    rows = [side.row() for side in sides]
    summary = extrapolate(rows, *step)
    print(results.format_table(rows))
    bare, ours = (row["clips_s"] for row in rows[:6] if row["cores"] == sides[0].cores)
    print(f"ours / bare, one core: {ours / bare:.2f}, should be at least 0.8")
    print(*(f"{name:20}{value:12,.3f}" for name, value in summary.items()), sep="\n")
    arguments = {"clips": CLIPS, "frames": FRAMES, "batch": BATCH}
    arguments |= {"step_s": step[0], "step_frames": step[1], "quick": args.quick}
    print(results.write("input_pipeline", arguments, [*rows, summary]))


if __name__ == "__main__":
    main()
