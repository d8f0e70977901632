"""Synthetic segments and sentences with the statistics that make a search hard.

Files of 20 synthetic segments have a sub-topic of a topic, which others share. A frame is the sum
of equal parts of topic, sub-topic, file, segment and its own; one in ten is of something else. All
have a direction in common, as CLIP's have: unrelated videos have a cosine of 0.6, a sentence has
0.2 with those of others and 0.4 with its own. It is about three frames of its segment, half of its
words each about one of them, while the other half say nothing; noise is added to all. Its amount
(see `noise`) was chosen, by trying several with 20,000 and 100,000 segments, so that the whole
model ranks the own segment first about every other time: the larger the gallery, the less noise.
"""

import numpy as np
import pyarrow as pa

from xclip_jax.search.index import SEGMENT_SECONDS
from xclip_jax.similarity import TextFeatures

DIM, FRAMES, WORDS = 512, 12, 32
FILE, CHUNK = 20, 4000  # segments of a file; of what is in memory at once
TOPICS = 200
SPECTRUM = np.arange(1, DIM + 1, dtype=np.float32) ** -0.375


class World:
    """What videos and sentences are about, the same in every run."""

    def __init__(self, segments):
        rng = np.random.default_rng(0)
        self.pictures, other = directions(rng, 2)  # what all pictures have in common
        self.texts = 0.4 * self.pictures + (1 - 0.4**2) ** 0.5 * other
        self.topics = directions(rng, TOPICS)
        subtopics = max(10, segments // 100)
        self.subtopics = directions(rng, subtopics)
        self.topic_of = rng.integers(0, TOPICS, subtopics)

    def subjects(self, rng, count):
        """count x D: topic and sub-topic, some more frequent than others."""
        sub = (len(self.subtopics) * rng.random(count) ** 1.5).astype(int)
        return self.topics[self.topic_of[sub]] + self.subtopics[sub]

    def frames(self, rng, count):
        """Frames of CHUNK segments."""
        files = self.subjects(rng, count // FILE) + directions(rng, count // FILE)
        segments = np.repeat(files, FILE, axis=0) + directions(rng, count)
        frames = directions(rng, count, FRAMES)
        elsewhere = rng.random(frames.shape[:2]) < 0.1
        other = self.subjects(rng, elsewhere.sum()) + 2**0.5 * directions(rng, elsewhere.sum())
        segments = np.repeat(segments[:, None], FRAMES, axis=1)
        segments[elsewhere] = other
        return unit((frames + segments) * 5**-0.5 + self.pictures)

    def queries(self, rng, video, noise):
        """TextFeatures of a sentence for each of some VideoFeatures."""
        count = len(video.mask)
        described = (rng.random((count, 3)) * video.mask.sum(1)[:, None]).astype(int)
        frames = np.take_along_axis(video.frames, described[..., None], 1)
        content = unit(frames - (frames @ self.pictures)[..., None] * self.pictures)
        lengths = rng.integers(6, 18, count)
        mask = np.arange(WORDS) < lengths[:, None]
        told = np.take_along_axis(content, rng.integers(0, 3, (count, WORDS))[..., None], 1)
        told *= rng.random((count, WORDS, 1)) < 0.5
        shared = directions(rng, count)
        own = directions(rng, count, WORDS)
        words = self.texts + told + noise * (shared[:, None] + own) * 0.5**0.5
        sentence = self.texts + unit(content.mean(1)) + noise * shared
        return TextFeatures(unit(sentence), unit(words), mask)


def directions(rng, *shape):
    """Unit vectors; few of their dimensions hold most of them, so that more are alike."""
    return unit(rng.standard_normal((*shape, DIM), np.float32) * SPECTRUM)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def batches(schema, segments, bar):
    """Yields Arrow batches of CHUNK rows; their numbers do not depend on the batches before."""
    world = World(segments)
    for first in range(0, segments, CHUNK):
        rng = np.random.default_rng([1, first])
        number = np.arange(first, min(first + CHUNK, segments))
        count = np.where(rng.random(CHUNK) < 0.05, rng.integers(1, FRAMES + 1, CHUNK), FRAMES)
        mask = (np.arange(FRAMES) < count[:, None])[: len(number), :, None]
        frames = world.frames(rng, CHUNK)[: len(number)] * mask
        start = number % FILE * float(SEGMENT_SECONDS)
        columns = {
            "id": [f"{n:016x}" for n in number],
            "path": [f"/videos/{n // FILE % 1000:03}/{n // FILE:08}.mp4" for n in number],
            "size": number * 0,
            "mtime": number * 0,
            "start": start,
            "end": start + SEGMENT_SECONDS,
            "count": count[: len(number)],
            "times": (start[:, None] + np.linspace(1, 28, FRAMES)) * mask[..., 0],
            "video": unit(frames.sum(1)),  # Eq. 2
            "frames": frames.reshape(len(number), -1),
            "thumbnail": [b""] * len(number),
        }
        arrays = [_column(columns[field.name], field.type) for field in schema]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)
        bar.update(len(number))


def _column(values, kind):
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values, kind)
    flat = np.asarray(values, kind.value_type.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def noise(segments):
    """See above."""
    return 2.1 - 0.2 * float(np.log10(segments / 100_000))


def make_queries(store, segments, count):
    """(TextFeatures of sentences, row of each one's own segment)."""
    snapshot, rng = store.snapshot(), np.random.default_rng(2)
    rows = rng.choice(segments, count, replace=count > segments)
    video = snapshot.features(rows)
    video = video.replace(frames=video.frames.astype(np.float32))
    text = World(segments).queries(rng, video, noise(segments))
    return text, rows
