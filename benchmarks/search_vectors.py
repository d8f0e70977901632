"""Synthetic segments and sentences with the statistics that make a search difficult.

Each file has 20 segments, a topic and a sub-topic, both shared with other files. A frame is the
sum of equal parts of topic, sub-topic, file, segment and its own direction. One frame in ten shows
something else. All frames share one direction, as CLIP's do: unrelated videos have a cosine of 0.6,
a sentence has 0.2 with unrelated videos and 0.4 with its own. A sentence describes three frames of
its segment. Half of its words describe one of these frames each, the other half describe none.
Noise is added to all words and sentences. Its amount was chosen with 20,000 and 100,000 segments so
that the full model ranks the correct segment first about half of the time; larger galleries get
less noise.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from xclip_jax.search.digests import PARTS, add_digests
from xclip_jax.search.index import SEGMENT_SECONDS
from xclip_jax.search.store import Store
from xclip_jax.similarity import TextFeatures, VideoFeatures

DIM, FRAMES, WORDS = 512, 12, 32
SEGMENTS_PER_FILE, CHUNK = 20, 4000
TOPICS = 200
SPECTRUM = np.arange(1, DIM + 1, dtype=np.float32) ** -0.375


class World:
    """Topics and shared directions of videos and sentences, the same in every run."""

    def __init__(self, segments: int) -> None:
        rng = np.random.default_rng(0)
        self.frame_mean, other = random_directions(rng, 2)
        self.text_mean = 0.4 * self.frame_mean + (1 - 0.4**2) ** 0.5 * other
        self.topics = random_directions(rng, TOPICS)
        subtopics = max(10, segments // 100)
        self.subtopics = random_directions(rng, subtopics)
        self.topic_of = rng.integers(0, TOPICS, subtopics)

    def sample_subjects(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns count x D sums of topic and sub-topic, some more frequent than others."""
        subtopics = (len(self.subtopics) * rng.random(count) ** 1.5).astype(int)
        return self.topics[self.topic_of[subtopics]] + self.subtopics[subtopics]

    def sample_frames(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns count x F x D frames of consecutive segments."""
        num_files = count // SEGMENTS_PER_FILE
        files = self.sample_subjects(rng, num_files) + random_directions(rng, num_files)
        segments = np.repeat(files, SEGMENTS_PER_FILE, axis=0) + random_directions(rng, count)
        frames = random_directions(rng, count, FRAMES)
        unrelated = rng.random(frames.shape[:2]) < 0.1
        total = unrelated.sum()
        subjects = self.sample_subjects(rng, total) + 2**0.5 * random_directions(rng, total)
        segments = np.repeat(segments[:, None], FRAMES, axis=1)
        segments[unrelated] = subjects
        return normalize((frames + segments) * 5**-0.5 + self.frame_mean)

    def sample_queries(
        self, rng: np.random.Generator, video: VideoFeatures, noise: float
    ) -> TextFeatures:
        """Returns one sentence for each of the videos."""
        count = len(video.mask)
        described = (rng.random((count, 3)) * video.mask.sum(1)[:, None]).astype(int)
        frames = np.take_along_axis(video.frames, described[..., None], 1)
        content = normalize(frames - (frames @ self.frame_mean)[..., None] * self.frame_mean)
        mask = np.arange(WORDS) < rng.integers(6, 18, count)[:, None]
        word_content = np.take_along_axis(content, rng.integers(0, 3, (count, WORDS))[..., None], 1)
        word_content *= rng.random((count, WORDS, 1)) < 0.5
        sentence_noise = random_directions(rng, count)
        word_noise = random_directions(rng, count, WORDS)
        words = self.text_mean + word_content
        words += noise * (sentence_noise[:, None] + word_noise) * 0.5**0.5
        sentence = self.text_mean + normalize(content.mean(1)) + noise * sentence_noise
        return TextFeatures(normalize(sentence), normalize(words), mask)


def random_directions(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Returns unit vectors with a decaying spectrum, which makes them more alike."""
    return normalize(rng.standard_normal((*shape, DIM), np.float32) * SPECTRUM)


def normalize(x: np.ndarray) -> np.ndarray:
    """Returns vectors of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_batches(schema: pa.Schema, segments: int, bar: tqdm) -> Iterator[pa.RecordBatch]:
    """Yields Arrow batches of CHUNK rows. Each depends only on its first row number."""
    world = World(segments)
    for first in range(0, segments, CHUNK):
        rng = np.random.default_rng([1, first])
        number = np.arange(first, min(first + CHUNK, segments))
        count = np.where(rng.random(CHUNK) < 0.05, rng.integers(1, FRAMES + 1, CHUNK), FRAMES)
        mask = (np.arange(FRAMES) < count[:, None])[: len(number), :, None]
        frames = world.sample_frames(rng, CHUNK)[: len(number)] * mask
        file = number // SEGMENTS_PER_FILE
        start = number % SEGMENTS_PER_FILE * float(SEGMENT_SECONDS)
        columns = {
            "id": [f"{n:016x}" for n in number],
            "path": [f"/videos/{n % 1000:03}/{n:08}.mp4" for n in file],
            "size": number * 0,
            "mtime": number * 0,
            "start": start,
            "end": start + SEGMENT_SECONDS,
            "offset": start * 0,
            "sample": number * 0,
            "count": count[: len(number)],
            "times": (start[:, None] + np.linspace(1, 28, FRAMES)) * mask[..., 0],
            "video": normalize(frames.sum(1)),  # Eq. 2
            "frames": frames.reshape(len(number), -1),
            "thumbnail": [b""] * len(number),
        }
        fields = [field for field in schema if field.name not in PARTS]
        arrays = [_make_column(columns[field.name], field.type) for field in fields]
        table = add_digests(pa.Table.from_arrays(arrays, schema=pa.schema(fields)))
        yield from table.select(schema.names).to_batches()
        bar.update(len(number))


def _make_column(values: np.ndarray | list, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values, kind)
    flat = np.asarray(values, kind.value_type.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def noise_for(segments: int) -> float:
    """Returns the amount of noise for a gallery size, see the module docstring."""
    return 2.1 - 0.2 * float(np.log10(segments / 100_000))


def make_queries(store: Store, segments: int, count: int) -> tuple[TextFeatures, np.ndarray]:
    """Returns (sentences, row of the segment that each one describes)."""
    snapshot, rng = store.snapshot(), np.random.default_rng(2)
    rows = rng.choice(segments, count, replace=count > segments)
    video = snapshot.features(rows)
    video = video.replace(frames=video.frames.astype(np.float32))
    return World(segments).sample_queries(rng, video, noise_for(segments)), rows
