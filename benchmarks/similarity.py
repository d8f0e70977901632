"""Measures the similarity of 1,000 texts x 1,000 videos: time against PyTorch, and peak memory.

    python benchmarks/similarity.py --torch

    python benchmarks/similarity.py --memory=4917 --texts=128 --words=64 --frames=64

    python benchmarks/similarity.py --torch --count=4917 --words=64 --frames=64 --repeats=1

Computes all four granularities. The second line measures only memory, for a slice of the texts of
ActivityNet's test set; the third, for a GPU, only times. PyTorch computes torch_xclip.similarity in
blocks of 40 x 40, on a GPU 128 x 128, alternating with JAX in one process. Peak memory excludes the
features and the result.
"""

import argparse
import json
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import results

from xclip_jax.models import ModelConfig, XClip
from xclip_jax.retriever import Retriever
from xclip_jax.similarity import TextFeatures, VideoFeatures

DIM = 512
NEARNESS = 0.15  # of a video to its own text: about half are ranked first
MODEL = XClip(ModelConfig(embed_dim=DIM).resolve())
PARAMS = {"clip": {"logit_scale": jnp.zeros(())}}  # the only parameter that `similarity` reads


def make_features(
    count: int, *, num_words: int = 32, num_frames: int = 12
) -> tuple[TextFeatures, VideoFeatures]:
    """Returns random features of `count` texts and videos of random lengths.

    Videos are a little closer to their own texts than to others.
    """
    rng = np.random.default_rng(0)

    def make_unit(*shape: int) -> np.ndarray:
        x = np.empty((*shape, DIM), np.float32)
        for row in x:  # row by row, so that temporary arrays stay small
            rng.standard_normal(out=row, dtype=np.float32)
            row /= np.linalg.norm(row, axis=-1, keepdims=True)
        return x

    words = np.arange(num_words) < rng.integers(5, num_words + 1, (count, 1))
    frames = np.arange(num_frames) < rng.integers(3, num_frames + 1, (count, 1))
    text = TextFeatures(make_unit(count), make_unit(count, num_words), words)
    video = VideoFeatures(make_unit(count), make_unit(count, num_frames), frames)
    video.video[:] += NEARNESS * text.sentence
    video.frames[:] += NEARNESS * text.sentence[:, None]
    for x in (video.video, video.frames):
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return text, video


def torch_similarity(text: TextFeatures, video: VideoFeatures) -> np.ndarray:
    """Returns the T x V similarities that torch_xclip.py computes block by block."""
    import torch
    import torch_xclip

    device, block = ("cuda", 128) if torch.cuda.is_available() else ("cpu", 40)

    def split(*arrays: np.ndarray) -> list[list[torch.Tensor]]:
        tensors = [torch.from_numpy(x).to(device) for x in arrays]
        return [[x[i : i + block] for x in tensors] for i in range(0, len(arrays[0]), block)]

    texts = split(text.sentence, text.words, text.mask)
    videos = split(video.video, video.frames, video.mask)
    with torch.no_grad():
        rows = [
            torch.cat([torch_xclip.similarity(s, w, v, f, sw, vf) for v, f, vf in videos], 1)
            for s, w, sw in texts
        ]
    return torch.cat(rows).cpu().numpy()


def compare(
    count: int, *, words: int, frames: int, repeats: int, with_torch: bool
) -> list[results.Row]:
    """Returns the seconds of each side and of the word-frame product, the medians last."""
    text, video = make_features(count, num_words=words, num_frames=frames)
    left, right = text.words.reshape(-1, DIM), jnp.asarray(video.frames.reshape(-1, DIM))
    some = jnp.asarray(left[: 2**26 // len(right)])  # to save memory
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b.T, precision="highest"))
    agreement = {}
    sides = {
        "ours": lambda: Retriever({}, MODEL, PARAMS).similarity(text, video),
        "product": lambda: multiply(some, right),
    }
    if with_torch:
        sides["torch"] = lambda: torch_similarity(text, video)
        agreement = compare_ranks(sides["ours"](), sides["torch"]())
    for run in sides.values():
        results.measure_seconds(run)  # compiles
    rows = []
    for _ in range(repeats):
        row = {name: results.measure_seconds(run)[0] for name, run in sides.items()}
        row["product"] *= len(left) / len(some)
        rows.append(row | ({"ratio": row["ours"] / row["torch"]} if with_torch else {}))
    rows.append({name: statistics.median(row[name] for row in rows) for name in rows[0]})
    print(results.format_table(rows))
    print("seconds, the medians last; ours / torch should be at most 0.35, ours / product 1.2")
    if agreement:
        print(results.format_table([agreement]))
    return [*rows, agreement] if agreement else rows


def compare_ranks(found_TxV: np.ndarray, expected_TxV: np.ndarray) -> results.Row:
    """Returns the difference of two matrices, and of their ranks of the T = V right videos."""
    np.testing.assert_allclose(found_TxV, expected_TxV, atol=1e-5)
    ranks = [np.sum(s > np.diag(s)[:, None], 1) for s in (found_TxV, expected_TxV)]
    row = {"max_difference": float(np.max(np.abs(found_TxV - expected_TxV)))}
    for k in (1, 5, 10):
        row[f"r@{k}"], row[f"torch_r@{k}"] = (float(np.mean(rank < k)) for rank in ranks)
    return row | {"equal_ranks": float(np.mean(ranks[0] == ranks[1]))}


def measure_memory(count: int, texts: int, *, words: int, frames: int) -> float:
    """Returns the peak MiB above the features and the result, including the compiler's memory."""
    text, video = make_features(count, num_words=words, num_frames=frames)
    text = jax.tree.map(lambda x: x[:texts], text)
    before = results.peak_mib() + texts * count * 4 / 2**20
    Retriever({}, MODEL, PARAMS).similarity(text, video)
    return results.peak_mib() - before


def main() -> None:
    """Prints times and memory, or memory only with --memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", action="store_true", help="also time PyTorch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--count", type=int, default=1000, help="number of texts and of videos")
    parser.add_argument("--memory", type=int, help="measure only memory, for this many videos")
    parser.add_argument("--texts", type=int, help="with --memory: number of texts (default: equal)")
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--frames", type=int, default=12)
    args = parser.parse_args()
    if args.memory:
        texts = args.texts or args.memory
        print(measure_memory(args.memory, texts, words=args.words, frames=args.frames))
        return
    lengths = {"words": args.words, "frames": args.frames}
    rows = compare(args.count, **lengths, repeats=args.repeats, with_torch=args.torch)
    on_host = jax.default_backend() == "cpu"  # whose memory can be measured
    for count in (args.count, 4 * args.count) if on_host else ():
        command = [sys.executable, __file__, f"--memory={count}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        rows.append({"texts": count, "videos": count, "peak_mib": json.loads(done.stdout)})
        print(f"{count} x {count}: {rows[-1]['peak_mib']:.0f} MiB above the features")
    print(results.write("similarity", vars(args), rows))


if __name__ == "__main__":
    main()
