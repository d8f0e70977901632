"""Compares the funnel with exhaustive search, in results and time."""

import itertools
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from xclip_jax.cli import InputError, progress
from xclip_jax.search.index import Index

_SUBJECTS = (
    "a man", "a woman", "two men", "a young girl", "a boy", "a group of people", "a dog", "a cat",
    "a crowd", "a singer", "a chef", "a football player", "a teacher", "children", "a red car",
    "an old woman", "a horse", "a band", "a cartoon character", "a reporter",
)  # fmt: skip
_VERBS = (
    "is talking", "is dancing", "is running", "is playing the guitar", "is cooking", "is driving",
    "is swimming", "is eating", "is jumping", "is singing", "is reading a book", "is laughing",
    "is riding a bicycle", "is fighting", "is drawing", "is falling", "is playing a game",
    "is walking slowly", "is opening a box", "is looking at the camera",
)  # fmt: skip
_PLACES = (
    "", "in a kitchen", "on a stage", "in the street", "on the beach", "in a park", "at night",
    "in the snow", "in front of a house", "in a room",
)  # fmt: skip


def sample_sentences(count: int) -> list[str]:
    """Returns `count` different sentences of common words, the same in every call."""
    parts = itertools.product(_SUBJECTS, _VERBS, _PLACES)
    sentences = [" ".join(filter(None, words)) for words in parts]
    if count > len(sentences):
        raise InputError(f"--sample={count}: must be at most {len(sentences)} without --queries")
    return random.Random(0).sample(sentences, count)


def measure_recall(index: Index, texts: Sequence[str]) -> dict[str, Any]:
    """Runs each text through the funnel and through exhaustive search.

    Returns:
        `sentences`, `segments`, `candidates`, `rerank`; `top_1` and `top_10`: percentage of the
        first and of the first ten exhaustive results that are in the funnel's first ten;
        `milliseconds`: {stage: {"p50", "p95"}}, including `total`.

    Raises:
        InputError: the index is empty.
    """
    if not len(index):
        raise InputError(f"the index {index.location} is empty")
    index.query(texts[0])  # compiles
    funnel_ids, seconds = [], []
    for text in texts:
        started = time.perf_counter()
        answer = index.query(text)
        seconds.append({**answer.seconds, "total": time.perf_counter() - started})
        funnel_ids.append([hit.id for hit in answer])
    with progress(len(index), "exhaustive search", "segment") as bar:
        answers = index.query_exhaustively(texts, bar=bar)
    exhaustive_ids = [[hit.id for hit in answer] for answer in answers]
    recalls = [
        (expected[0] in ids, sum(segment_id in ids for segment_id in expected) / len(expected))
        for expected, ids in zip(exhaustive_ids, funnel_ids, strict=True)
    ]
    top_1, top_10 = 100 * np.mean(recalls, axis=0)
    return {
        "sentences": len(texts),
        "segments": len(index),
        "candidates": index.candidates,
        "rerank": index.rerank,
        "top_1": round(float(top_1), 2),
        "top_10": round(float(top_10), 2),
        "milliseconds": {name: _percentiles([s[name] for s in seconds]) for name in seconds[0]},
    }


def format_recall(result: dict[str, Any]) -> str:
    """Returns the result of `measure_recall` as text."""
    lines = [
        f"{result['sentences']:,} sentences, {result['segments']:,} segments, funnel "
        f"{result['candidates']:,} -> {result['rerank']:,}",
        f"exhaustive first result in the funnel's first ten:  {result['top_1']:5.1f} %",
        f"exhaustive first ten in the funnel's first ten:     {result['top_10']:5.1f} %",
        f"{'milliseconds':16}{'p50':>8}{'p95':>8}",
    ]
    for stage, times in result["milliseconds"].items():
        lines.append(f"{stage:16}{times['p50']:8.1f}{times['p95']:8.1f}")
    return "\n".join(lines)


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p95 = 1000 * np.percentile(seconds, (50, 95))
    return {"p50": round(float(p50), 2), "p95": round(float(p95), 2)}
