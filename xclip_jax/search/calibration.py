"""Calibrates an index: scores of unrelated pairs, and sentences worth trying.

Sentences of common words are compared with some of the segments. Nearly all of these pairs are
unrelated.
"""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from xclip_jax.cli import InputError
from xclip_jax.inference import pad_rows
from xclip_jax.retriever import Retriever
from xclip_jax.search.snapshot import Snapshot
from xclip_jax.search.vectors import unit_vectors

SENTENCES, SEGMENTS = 64, 256  # that are compared
WEAK_PERCENTILE = 99.0  # of the scores of unrelated pairs
EXAMPLES = 6  # of these, which a visitor may try
_EXAMPLES = (
    "a person talking to the camera", "people dancing", "someone cooking", "a car on a road",
    "children playing", "a street at night", "snow", "the sea", "a crowd of people", "an animal",
    "a close-up of a face", "people doing sports", "food on a table", "trees and grass",
    "a room with people", "fire", "a cartoon", "a dog", "a bird", "a machine at work",
    "someone speaking on a stage", "a landscape seen from above",
)  # fmt: skip
_SUBJECTS = (
    "a man", "a woman", "an old man", "a young girl", "a boy", "a group of people", "a dog",
    "a cat", "a crowd", "a singer", "a chef", "a football player", "a teacher", "a child",
    "a red car", "an old woman", "a horse", "a band", "a cartoon character", "a reporter",
)  # fmt: skip
_VERBS = (
    "is talking", "is dancing", "is running", "is playing the guitar", "is cooking", "is driving",
    "is swimming", "is eating", "is jumping", "is singing", "is reading a book", "is laughing",
    "is riding a bicycle", "is fighting", "is drawing", "is falling", "is playing a game",
    "is walking slowly", "is opening a box", "is looking at the camera",
)  # fmt: skip
_PLACES = (
    "", " in a kitchen", " on a stage", " in the street", " on the beach", " in a park",
    " at night", " in the snow", " in front of a house", " in a room",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Values of an index that depend on its model and segments."""

    threshold: float | None = None  # of score - bias, below which a match is weak
    background: float | None = None  # mean cosine of a frame and an unrelated sentence
    examples: tuple[str, ...] = ()  # sentences to try, best match first
    version: int = 0  # of the segments


def calibrate(
    scores_TxN: Float[np.ndarray, "T N"], cosines_TxNxF: Float[np.ndarray, "T N F"]
) -> Calibration:
    """Returns the calibration of the scores of T unrelated sentences and N segments.

    `cosines_TxNxF` are NaN where a segment has no frame.
    """
    threshold = float(np.percentile(scores_TxN, WEAK_PERCENTILE))
    return Calibration(threshold, float(np.nanmean(cosines_TxNxF)))


def choose_examples(
    sentences: Sequence[str], scores_TxN: Float[np.ndarray, "T N"], threshold: float
) -> tuple[str, ...]:
    """Returns the sentences whose best segments score highest, above the threshold.

    Of several with the same best segment it is the first.
    """
    chosen: dict[int, Any] = {}  # best segment -> sentence
    for row in np.argsort(-scores_TxN.max(1)).tolist():
        if scores_TxN[row].max() >= threshold:
            chosen.setdefault(int(scores_TxN[row].argmax()), sentences[row])
    return tuple(itertools.islice(chosen.values(), EXAMPLES))


def measure(retriever: Retriever, snapshot: Snapshot) -> Calibration:
    """Returns the calibration of a model and of a sample of an index's segments, at least one."""
    rows = snapshot.sample(SEGMENTS)
    sentences, video = [*sample_sentences(SENTENCES), *_EXAMPLES], snapshot.features(rows)
    text = retriever.encode_text(sentences)
    sim_TxN = retriever.similarity(text, pad_rows(video, SEGMENTS))[:, : len(rows)]
    scores_TxN = sim_TxN - retriever.scale * snapshot.biases(rows)
    frames_NxFxD = unit_vectors(np.asarray(video.frames))
    cosines_TxNxF = np.einsum("td,nfd->tnf", unit_vectors(np.asarray(text.sentence)), frames_NxFxD)
    cosines_TxNxF = np.where(video.mask, cosines_TxNxF, np.nan)
    calibration = calibrate(scores_TxN[:SENTENCES], cosines_TxNxF[:SENTENCES])
    examples = _EXAMPLES, scores_TxN[SENTENCES:], calibration.threshold or 0.0
    return dataclasses.replace(
        calibration, examples=choose_examples(*examples), version=snapshot.version
    )


def sample_sentences(count: int) -> list[str]:
    """Returns `count` different sentences of common words, the same in every call."""
    parts = itertools.product(_SUBJECTS, _VERBS, _PLACES)
    sentences = [f"{subject} {verb}{place}" for subject, verb, place in parts]
    if count > len(sentences):
        raise InputError(f"--sample={count}: must be at most {len(sentences)} without --queries")
    return random.Random(0).sample(sentences, count)
