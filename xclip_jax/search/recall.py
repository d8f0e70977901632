"""What the funnel loses against scoring everything, and what its stages cost."""

import itertools
import random
import time

import numpy as np

from xclip_jax.cli import InputError, progress

_WHO = (
    "a man", "a woman", "two men", "a young girl", "a boy", "a group of people", "a dog", "a cat",
    "a crowd", "a singer", "a chef", "a football player", "a teacher", "children", "a red car",
    "an old woman", "a horse", "a band", "a cartoon character", "a reporter",
)  # fmt: skip
_DOES = (
    "is talking", "is dancing", "is running", "is playing the guitar", "is cooking", "is driving",
    "is swimming", "is eating", "is jumping", "is singing", "is reading a book", "is laughing",
    "is riding a bicycle", "is fighting", "is drawing", "is falling", "is playing a game",
    "is walking slowly", "is opening a box", "is looking at the camera",
)  # fmt: skip
_WHERE = (
    "", "in a kitchen", "on a stage", "in the street", "on the beach", "in a park", "at night",
    "in the snow", "in front of a house", "in a room",
)  # fmt: skip


def sentences(count):
    """So many different sentences of common words; the same every time."""
    every = [" ".join(filter(None, words)) for words in itertools.product(_WHO, _DOES, _WHERE)]
    if count > len(every):
        raise InputError(f"--sample={count}: at most {len(every)}, or give your own --queries")
    return random.Random(0).sample(every, count)


def measure(index, texts):
    """Asks an index T sentences by the funnel and exhaustively.

    Returns:
        dict: `sentences`, `segments`, `candidates`, `rerank`; `top_1` and `top_10`: share of the
        exhaustive best and best ten segments (all, if there are fewer) in the funnel's first ten,
        percent; `milliseconds`: {stage: {"p50", "p95"}}, `total` included.

    Raises:
        InputError: the index is empty.
    """
    if not len(index):
        raise InputError(f"{index.location} is empty")
    index.query(texts[0])  # compiles
    fast, stages = [], []
    for text in texts:
        started = time.perf_counter()
        answer = index.query(text)
        total = time.perf_counter() - started
        fast.append([hit.id for hit in answer])
        stages.append({**answer.seconds, "total": total})
    with progress(len(index), "scoring everything", "segment") as bar:
        slow = [[hit.id for hit in answer] for answer in index.query_exhaustively(texts, bar=bar)]
    shares = [(want[0] in got, np.mean([hit in got for hit in want]))
              for want, got in zip(slow, fast, strict=True)]  # fmt: skip
    top_1, top_10 = 100 * np.mean(shares, axis=0)
    candidates, rerank = index.widths
    return {
        "sentences": len(texts),
        "segments": len(index),
        "candidates": candidates,
        "rerank": rerank,
        "top_1": round(float(top_1), 2),
        "top_10": round(float(top_10), 2),
        "milliseconds": {name: _percentiles([one[name] for one in stages]) for name in stages[0]},
    }


def _percentiles(seconds):
    p50, p95 = 1000 * np.percentile(seconds, (50, 95))
    return {"p50": round(float(p50), 2), "p95": round(float(p95), 2)}


def table(result):
    """The result of `measure` for people."""
    lines = [
        f"{result['sentences']:,} sentences, {result['segments']:,} segments, funnel "
        f"{result['candidates']:,} -> {result['rerank']:,}",
        f"the exhaustive best segment is in the funnel's first ten: {result['top_1']:.1f} %",
        f"share of the exhaustive ten best that is:                 {result['top_10']:.1f} %",
        f"{'milliseconds':16}{'p50':>8}{'p95':>8}",
    ]
    for stage, times in result["milliseconds"].items():
        lines.append(f"{stage:16}{times['p50']:8.1f}{times['p95']:8.1f}")
    return "\n".join(lines)
