"""Measures the input pipeline in clips per second against bare JPEG decoding of the same bytes.

    python benchmarks/input_pipeline.py

Writes a data set of 224-pixel frames to a temporary folder. Both sides use four threads and are
timed alternately. Target: at least 0.8 of the rate of bare decoding. --torch also times a plain
PyTorch DataLoader on the same clips, with Pillow and one worker process per core.
"""

import argparse
import functools
import io
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import results

from xclip_jax.data.builder import Dataset, DatasetSettings, PendingRecord, write_dataset
from xclip_jax.data.pipeline import TrainingPairs, training_batches
from xclip_jax.data.preprocess import FrameFormat, decode_jpeg, encode_jpeg
from xclip_jax.data.text import learn_tokenizer
from xclip_jax.data.tokenizer import Tokenizer

CLIPS, FRAMES, BATCH, THREADS, SIDE = 200, 12, 20, 4, 224


def make_dataset(folder: str) -> Dataset:
    """Writes clips of random coloured blocks, returns the data set."""
    rng = np.random.default_rng(0)

    def make_record(number: int) -> dict:
        blocks = rng.integers(0, 256, (FRAMES, 28, 28, 3), np.uint8)
        frames = blocks.repeat(8, 1).repeat(8, 2)
        jpegs = [encode_jpeg(np.ascontiguousarray(frame)) for frame in frames]
        captions = [f"clip number {number}"]
        return {"id": str(number), "captions": captions, "frames": jpegs, "times": [*range(FRAMES)]}

    clips = [PendingRecord(functools.partial(make_record, n), 1, str(n)) for n in range(CLIPS)]
    write_dataset(folder, {"train": clips}, DatasetSettings(image_size=SIDE))
    return Dataset(folder)


def decode_only(jpegs: list[list[bytes]], batches: int) -> Callable[[], None]:
    """Returns a function that decodes the JPEGs of `batches` batches."""
    pool = ThreadPoolExecutor(THREADS)

    def decode(number: int) -> list[np.ndarray]:
        return list(map(decode_jpeg, jpegs[number % CLIPS]))

    return lambda: list(pool.map(decode, range(BATCH * batches)))


def read_pipeline(dataset: Dataset, tokenizer: Tokenizer, batches: int) -> Callable[[], None]:
    """Returns a function that reads `batches` training batches."""
    pairs = TrainingPairs(dataset, "train", "all")

    def read() -> None:
        iterator = training_batches(pairs, tokenizer, BATCH, FRAMES, FrameFormat(SIDE), seed=0)
        for _ in range(batches):
            next(iterator)

    return read


def read_torch(jpegs: list[list[bytes]], tokenizer: Tokenizer, batches: int) -> Callable[[], None]:
    """Returns a function that reads `batches` batches from a DataLoader on a map-style Dataset."""
    import torch
    from PIL import Image

    class Clips(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return BATCH * batches

        def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            ids_1xW, mask_1xW = tokenizer([f"clip number {i % CLIPS}"])
            images = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs[i % CLIPS]]
            return ids_1xW[0], mask_1xW[0], np.stack([np.asarray(image) for image in images])

    workers = os.cpu_count() or 1
    loader = torch.utils.data.DataLoader(Clips(), BATCH, shuffle=True, num_workers=workers)
    return lambda: [None for _ in loader]


def measure(
    sides: dict[str, Callable[[], None]], *, batches: int, repeats: int
) -> list[results.Row]:
    """Returns the clips per second of each side, one row per repeat, the medians last."""
    rows = [
        {
            f"{name}_clips_s": BATCH * batches / results.measure_seconds(run)[0]
            for name, run in sides.items()
        }
        for _ in range(repeats)
    ]
    rows.append({name: statistics.median(row[name] for row in rows) for name in rows[0]})
    return [row | {"ratio": row["ours_clips_s"] / row["bare_clips_s"]} for row in rows]


def main() -> None:
    """Prints the rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", action="store_true", help="also time PyTorch's DataLoader")
    parser.add_argument("--batches", type=int, default=150, help="batches per timing")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(folder)
        jpegs = [record["frames"] for record in dataset.clips("train")]
        tokenizer = learn_tokenizer(["clip number 1"], max_words=32)
        sides = {
            "bare": decode_only(jpegs, args.batches),
            "ours": read_pipeline(dataset, tokenizer, args.batches),
        }
        if args.torch:
            sides["torch"] = read_torch(jpegs, tokenizer, args.batches)
        rows = measure(sides, batches=args.batches, repeats=args.repeats)
    print(results.format_table(rows))
    print("the medians are last; ours / bare should be at least 0.8")
    print(results.write("input_pipeline", {"clips": CLIPS, "frames": FRAMES, "batch": BATCH}, rows))


if __name__ == "__main__":
    main()
