"""Clips a second out of the input pipeline, against bare JPEG decoding of the same bytes.

    python benchmarks/input_pipeline.py

Makes a data set of 224-pixel frames in a temporary folder; both sides use the same four threads and
are timed in turn. Target: at least 0.8 of bare decoding.
"""

import functools
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

CLIPS, FRAMES, BATCH, BATCHES, THREADS = 200, 12, 20, 150, 4


def make(folder):
    rng = np.random.default_rng(0)

    def record(number):
        small = rng.integers(0, 256, (FRAMES, 28, 28, 3), np.uint8)
        frames = small.repeat(8, 1).repeat(8, 2)
        jpegs = [encode_jpeg(np.ascontiguousarray(frame)) for frame in frames]
        captions = [f"clip number {number}"]
        return {"id": str(number), "captions": captions, "frames": jpegs, "times": [*range(FRAMES)]}

    clips = [Pending(functools.partial(record, n), 1, str(n)) for n in range(CLIPS)]
    write_dataset(folder, {"train": clips}, 224)
    return Dataset(folder)


def main():
    """Prints the rates and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = make(folder)
        clips = dataset.clips("train")
        jpegs = [clips[i]["frames"] for i in range(CLIPS)]
        tokenizer = learn_tokenizer(["clip number 1"], max_words=32)
        pairs = TrainingPairs(dataset, "train", "all")
        count = BATCH * BATCHES
        rows = []
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in range(5):
                start = time.perf_counter()
                list(pool.map(lambda i: list(map(decode_jpeg, jpegs[i % CLIPS])), range(count)))
                bare = count / (time.perf_counter() - start)
                batches = training_batches(pairs, tokenizer, BATCH, FRAMES, 224, 0)
                next(batches)
                start = time.perf_counter()
                for _ in range(BATCHES):
                    next(batches)
                ours = count / (time.perf_counter() - start)
                del batches
                rows.append({"bare_clips_s": bare, "clips_s": ours, "ratio": ours / bare})
    rows.append({name: statistics.median(row[name] for row in rows) for name in rows[0]})
    print(results.table(rows))
    print("the medians last; pipeline / bare decoding should be at least 0.8")
    print(results.write("input_pipeline", {"clips": CLIPS, "frames": FRAMES, "batch": BATCH}, rows))


if __name__ == "__main__":
    main()
