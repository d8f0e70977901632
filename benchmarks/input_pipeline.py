"""Clips a second out of the input pipeline, against bare JPEG decoding of the same bytes.

    python benchmarks/input_pipeline.py

Makes a data set of 224-pixel frames in a temporary folder; both sides use the same four threads and
are timed in turn. Target: at least 0.8 of bare decoding. With --torch also a plain DataLoader of
PyTorch on the same clips: Pillow, a worker process a core.
"""

import argparse
import functools
import io
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import results

from xclip_jax.data.builder import Dataset, Pending, write_dataset
from xclip_jax.data.pipeline import TrainingPairs, training_batches
from xclip_jax.data.text import learn_tokenizer
from xclip_jax.data.video import decode_jpeg, encode_jpeg

CLIPS, FRAMES, BATCH, BATCHES, THREADS, SIDE = 200, 12, 20, 150, 4, 224


def make(folder):
    rng = np.random.default_rng(0)

    def record(number):
        small = rng.integers(0, 256, (FRAMES, 28, 28, 3), np.uint8)
        frames = small.repeat(8, 1).repeat(8, 2)
        jpegs = [encode_jpeg(np.ascontiguousarray(frame)) for frame in frames]
        captions = [f"clip number {number}"]
        return {"id": str(number), "captions": captions, "frames": jpegs, "times": [*range(FRAMES)]}

    clips = [Pending(functools.partial(record, n), 1, str(n)) for n in range(CLIPS)]
    write_dataset(folder, {"train": clips}, SIDE)
    return Dataset(folder)


class Bare:
    """Decodes the JPEGs and nothing else."""

    def __init__(self, jpegs):
        self._jpegs, self._pool = jpegs, ThreadPoolExecutor(THREADS)

    def run(self):
        def decode(i):
            return list(map(decode_jpeg, self._jpegs[i % CLIPS]))

        list(self._pool.map(decode, range(BATCH * BATCHES)))


class Ours:
    """The batches of training."""

    def __init__(self, dataset, tokenizer):
        pairs = TrainingPairs(dataset, "train", "all")
        self._start = functools.partial(
            training_batches, pairs, tokenizer, BATCH, FRAMES, SIDE, seed=0
        )

    def run(self):
        batches = self._start()
        for _ in range(BATCHES):
            next(batches)


class Torch:
    """A plain map-style Dataset in a DataLoader."""

    def __init__(self, jpegs, tokenizer):
        import torch
        from PIL import Image

        class Clips(torch.utils.data.Dataset):
            def __len__(self):
                return BATCH * BATCHES

            def __getitem__(self, i):
                ids_1xW, mask_1xW = tokenizer([f"clip number {i % CLIPS}"])
                images = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs[i % CLIPS]]
                return ids_1xW[0], mask_1xW[0], np.stack([np.asarray(image) for image in images])

        workers = os.cpu_count()
        self._loader = torch.utils.data.DataLoader(
            Clips(), BATCH, shuffle=True, num_workers=workers
        )

    def run(self):
        for _ in self._loader:
            pass


def measure(sides, repeats=5):
    """Clips a second of each side, a row a round; the medians last."""
    rows = []
    for _ in range(repeats):
        row = {}
        for name, side in sides.items():
            start = time.perf_counter()
            side.run()
            row[f"{name}_clips_s"] = BATCH * BATCHES / (time.perf_counter() - start)
        rows.append(row)
    rows.append({name: statistics.median(row[name] for row in rows) for name in rows[0]})
    return [row | {"ratio": row["ours_clips_s"] / row["bare_clips_s"]} for row in rows]


def main():
    """Prints the rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", action="store_true", help="time PyTorch's DataLoader too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = make(folder)
        jpegs = [record["frames"] for record in dataset.clips("train")]
        tokenizer = learn_tokenizer(["clip number 1"], max_words=32)
        sides = {"bare": Bare(jpegs), "ours": Ours(dataset, tokenizer)}
        if args.torch:
            sides["torch"] = Torch(jpegs, tokenizer)
        rows = measure(sides)
    print(results.table(rows))
    print("the medians last; ours / bare decoding should be at least 0.8")
    print(results.write("input_pipeline", {"clips": CLIPS, "frames": FRAMES, "batch": BATCH}, rows))


if __name__ == "__main__":
    main()
