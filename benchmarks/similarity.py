"""All four granularities of 1,000 texts x 1,000 videos: time against PyTorch, peak memory.

    python benchmarks/similarity.py --torch

    python benchmarks/similarity.py --memory=4917 --texts=128 --words=64 --frames=64

The second line measures memory alone, on a slice of the texts of ActivityNet's gallery. PyTorch's
side is the plain expression of torch_xclip.py in blocks of 40 x 40; the two are timed in turn, in
one run. Peak memory is that above the features.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import results

from xclip_jax.inference import similarity_in_blocks
from xclip_jax.models.clip import TextConfig, VisionConfig
from xclip_jax.models.xclip import XClip
from xclip_jax.similarity import TextFeatures, VideoFeatures

DIM = 512
MODEL = XClip(VisionConfig(), TextConfig(), DIM)
PARAMS = {"clip": {"logit_scale": jnp.zeros(())}}  # all that `similarity` reads


def features(count, num_words=32, num_frames=12, seed=0):
    rng = np.random.default_rng(seed)

    def unit(*shape):
        x = np.empty((*shape, DIM), np.float32)
        for row in x:  # one at a time: nothing but the features takes memory
            rng.standard_normal(out=row, dtype=np.float32)
            row /= np.linalg.norm(row, axis=-1, keepdims=True)
        return x

    words = np.arange(num_words) < rng.integers(5, num_words + 1, (count, 1))
    frames = np.arange(num_frames) < rng.integers(3, num_frames + 1, (count, 1))
    text = TextFeatures(unit(count), unit(count, num_words), words)
    return text, VideoFeatures(unit(count), unit(count, num_frames), frames)


def torch_similarity(text, video, block=40):
    """The same numbers by torch_xclip.py, block by block."""
    import torch
    import torch_xclip

    def blocks(*arrays):
        tensors = [torch.from_numpy(x) for x in arrays]
        return [[x[i : i + block] for x in tensors] for i in range(0, len(arrays[0]), block)]

    texts = blocks(text.sentence, text.words, text.mask)
    videos = blocks(video.video, video.frames, video.mask)
    with torch.no_grad():
        rows = [
            torch.cat([torch_xclip.similarity(s, w, v, f, sw, vf) for v, f, vf in videos], 1)
            for s, w, sw in texts
        ]
    return torch.cat(rows).numpy()


def seconds(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def compare(count, repeats, with_torch):
    text, video = features(count)

    def ours():
        return similarity_in_blocks(MODEL, PARAMS, text, video)

    def product():
        return jax.block_until_ready(
            flat(text.words.reshape(-1, DIM), video.frames.reshape(-1, DIM))
        )

    flat = jax.jit(lambda a, b: a[: len(a) // 4] @ b.T)
    ours(), product()
    rows = []
    for _ in range(repeats):
        row = {"ours": seconds(ours)[0], "product": 4 * seconds(product)[0]}
        if with_torch:
            row["torch"], theirs = seconds(lambda: torch_similarity(text, video))
            np.testing.assert_allclose(ours(), theirs, atol=1e-5)
            row["ratio"] = row["ours"] / row["torch"]
        rows.append(row)
    rows.append({name: statistics.median(row[name] for row in rows) for name in rows[0]})
    print(results.table(rows))
    print("seconds, the medians last; ours / torch should be at most 0.5")
    return rows


def memory(count, texts, words, frames):
    """Peak memory above the features and the result, MiB; the compiler's included."""
    text, video = features(count, words, frames)
    text = jax.tree.map(lambda x: x[:texts], text)
    before = results.peak_mib() + texts * count * 4 / 2**20
    similarity_in_blocks(MODEL, PARAMS, text, video)
    return results.peak_mib() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", action="store_true", help="time PyTorch too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--memory", type=int, default=0, help="only measure this gallery's memory")
    parser.add_argument("--texts", type=int, default=0, help="with so many of its texts; 0: all")
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--frames", type=int, default=12)
    args = parser.parse_args()
    if args.memory:
        texts = args.texts or args.memory
        print(json.dumps(memory(args.memory, texts, args.words, args.frames)))
    else:
        rows, peaks = compare(args.count, args.repeats, args.torch), []
        for count in (args.count, 4 * args.count):
            command = [sys.executable, __file__, "--memory", str(count)]
            peak = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            print(f"peak memory above the features, {count} x {count}: {peak:.0f} MiB")
            peaks.append({"texts": count, "videos": count, "peak_mib": peak})
        print(results.write("similarity", vars(args), rows + peaks))
