"""All four granularities of 1,000 texts x 1,000 videos: time against PyTorch, peak memory.

    pip install torch; python benchmarks/similarity.py

    python benchmarks/similarity.py --memory=4917 --texts=128 --words=64 --frames=64

The second line measures memory alone, on a slice of the texts of ActivityNet's gallery. Without
torch only our side is measured. PyTorch's side is the plain expression, masked, in blocks
of 40 x 40; the two are timed in turn, in one run. Peak memory is that above the features.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import results

from xclip_jax.inference import similarity_in_blocks
from xclip_jax.models.clip import TextConfig, VisionConfig
from xclip_jax.models.xclip import XClip
from xclip_jax.similarity import TextFeatures, VideoFeatures, word_mask

DIM, TAU = 512, 0.01
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


def torch_similarity(text, video, torch, block=40):
    """The same numbers, as one would write them in PyTorch."""

    def attend(scores, mask, axis):
        weights = torch.softmax((scores / TAU).masked_fill(~mask, -torch.inf), axis)
        return (weights * scores).sum(axis)

    def one(t, v):
        w, f = t.mask[:, None, :], v.mask[None, :, :]
        vs = t.sentence @ v.video.T
        vw = attend(torch.einsum("twd,vd->tvw", t.words, v.video), w, -1)
        fs = attend(torch.einsum("td,vfd->tvf", t.sentence, v.frames), f, -1)
        fw = torch.einsum("twd,vfd->tvwf", t.words, v.frames)
        by_word = attend(attend(fw, f[:, :, None, :], -1), w, -1)
        by_frame = attend(attend(fw, w[..., None], -2), f, -1)
        return (vs + vw + fs + (by_word + by_frame) / 2) / 4

    def slices(features):
        names = features.__dataclass_fields__
        tensors = {name: torch.from_numpy(np.asarray(getattr(features, name))) for name in names}
        tensors["mask"] = tensors["mask"].bool()
        count = len(tensors["mask"])
        return [
            SimpleNamespace(**{name: x[i : i + block] for name, x in tensors.items()})
            for i in range(0, count, block)
        ]

    with torch.no_grad():
        rows = [torch.cat([one(t, v) for v in slices(video)], 1) for t in slices(text)]
    return torch.cat(rows).numpy()


def seconds(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def compare(count, repeats):
    text, video = features(count)
    words_only = text.replace(mask=np.asarray(word_mask(jnp.asarray(text.mask))))

    def ours():
        return similarity_in_blocks(MODEL, PARAMS, text, video)

    def product():
        return jax.block_until_ready(
            flat(text.words.reshape(-1, DIM), video.frames.reshape(-1, DIM))
        )

    flat = jax.jit(lambda a, b: a[: len(a) // 4] @ b.T)
    ours(), product()
    try:
        import torch
    except ImportError:
        torch = None
    rows = []
    for _ in range(repeats):
        row = {"ours": seconds(ours)[0], "product": 4 * seconds(product)[0]}
        if torch:
            row["torch"], theirs = seconds(lambda: torch_similarity(words_only, video, torch))
            np.testing.assert_allclose(ours(), theirs, atol=1e-5)
        rows.append(row | ({"ratio": row["ours"] / row["torch"]} if torch else {}))
    rows.append({name: statistics.median(row[name] for row in rows) for name in rows[0]})
    print(results.table(rows))
    print("seconds, the medians last; ours / torch should be at most 0.5")
    return rows


def peak_mib():
    """Of this process alone (Linux); getrusage's ru_maxrss would include the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def memory(count, texts, words, frames):
    """Peak memory above the features and the result, MiB; the compiler's included."""
    text, video = features(count, words, frames)
    text = jax.tree.map(lambda x: x[:texts], text)
    before = peak_mib() + texts * count * 4 / 2**20
    similarity_in_blocks(MODEL, PARAMS, text, video)
    return peak_mib() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
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
        rows, peaks = compare(args.count, args.repeats), []
        for count in (args.count, 4 * args.count):
            command = [sys.executable, __file__, "--memory", str(count)]
            peak = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            print(f"peak memory above the features, {count} x {count}: {peak:.0f} MiB")
            peaks.append({"texts": count, "videos": count, "peak_mib": peak})
        print(results.write("similarity", vars(args), rows + peaks))
