"""The input pipeline: prepared clips to batches of arrays, by grain.

Batches depend on the seed only. The global batch of a step is the same for any number of
processes, threads and workers, and a run resumes by building the pipeline at its step: no iterator
state is saved.
"""

import atexit
import dataclasses
import functools
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, Int, UInt8

from xclip_jax.cli import InputError
from xclip_jax.data.builder import Dataset
from xclip_jax.data.preprocess import FrameFormat, decode_jpeg
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.workers import end_with_parent

Record = Mapping[str, Any]  # see data.builder.PendingRecord, with bytes in place of str
Pair = tuple[Record, int, int | None]  # record, video, caption: None until one is drawn
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
_TWO_BATCHES = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)


class Readers(NamedTuple):
    """The threads that read and decode clips, in this process or in each of `workers` processes."""

    threads: int
    workers: int = 0


FOUR_THREADS = Readers(4)


def choose_frames(
    num_frames: int, max_frames: int, *, spread: bool = False
) -> Int[np.ndarray, " F"]:
    """Returns the indices of all frames, or of `max_frames` uniformly spaced from first to last.

    With `spread` always of `max_frames`, at the start of as many equal parts, as in VideoPrism's
    code: some repeatedly if there are fewer.
    """
    if spread:
        return np.arange(max_frames) * num_frames // max_frames
    if num_frames <= max_frames:
        return np.arange(num_frames)
    return np.linspace(0, num_frames - 1, max_frames).astype(int)


def load_frames(
    record: Record, max_frames: int, format: FrameFormat
) -> tuple[UInt8[np.ndarray, "F S S 3"], Bool[np.ndarray, " F"]]:
    """Returns a record's frames, padded to F = `max_frames` with 0, and their mask, True = real.

    `format` is that of the data set.
    """
    frames_FxSxSx3 = np.zeros((max_frames, format.image_size, format.image_size, 3), np.uint8)
    return frames_FxSxSx3, _decode_frames(record, frames_FxSxSx3, spread=format.spread > 0)


def _decode_frames(
    record: Record, frames_FxSxSx3: UInt8[np.ndarray, "F S S 3"], *, spread: bool
) -> Bool[np.ndarray, " F"]:
    """Decodes a record's frames into an array and returns their mask, True = real."""
    max_frames = len(frames_FxSxSx3)
    chosen = choose_frames(len(record["frames"]), max_frames, spread=spread)
    for frame_SxSx3, index in zip(frames_FxSxSx3, chosen, strict=False):
        decode_jpeg(record["frames"][index], frame_SxSx3)
    return np.arange(max_frames) < len(chosen)


class TrainingPairs:
    """The (caption, video) pairs of a split, as a random-access source for grain.

    With captions="all" each caption is a pair of its own. With "random" there is one pair per
    video, whose caption is drawn later. At most `max_videos` (0: all) are used: a fixed selection,
    in which a smaller number gives a subset of a larger one.
    """

    def __init__(
        self, dataset: Dataset, split: str, captions: Literal["all", "random"], max_videos: int = 0
    ) -> None:
        self._clips = dataset.clips(split)
        self._counts = counts = dataset.captions_per_clip[split].tolist()
        chosen = np.random.default_rng(0).permutation(len(counts))[: max_videos or None]
        self._pairs: list[tuple[int, int | None]] = []
        for video in sorted(chosen.tolist()):
            numbers = range(counts[video]) if captions == "all" else [None]
            self._pairs += [(video, caption) for caption in numbers]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        video, caption = self._pairs[index]
        return self._clips[video], video, caption

    def draw_caption(self, index: int, rng: np.random.Generator) -> tuple[int, int]:
        """Returns `index` and the number of that pair's caption, drawn if it has none."""
        video, caption = self._pairs[index]
        return index, int(rng.integers(self._counts[video])) if caption is None else caption


def steps_per_epoch(pairs: TrainingPairs, batch_size: int) -> int:
    """Returns the number of complete batches in one pass, or raises InputError if there is none."""
    if len(pairs) < batch_size:
        limit = f"at most the {len(pairs)} training pairs of the data set"
        raise InputError(f"config.train.batch_size = {batch_size}: must be {limit}")
    return len(pairs) // batch_size


@dataclasses.dataclass(frozen=True)
class _BatchReader:
    """A function that reads the pairs of a batch, several at once, also in a worker process."""

    pairs: TrainingPairs
    tokenizer: Tokenizer
    max_frames: int
    format: FrameFormat
    threads: int

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:  # if two threads make one each, both serve
        return ThreadPoolExecutor(self.threads, thread_name_prefix="input")

    def __call__(self, drawn: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """Returns a batch of pairs given as (index, number of the caption)."""
        side = self.format.image_size
        # Decoded in place: with a copy of all frames, reading would take 1.5 times as long.
        frames = np.zeros((len(drawn), self.max_frames, side, side, 3), np.uint8)
        rows = list(self._pool.map(self._read_pair, drawn, frames))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {
            "frames": frames
        }

    def _read_pair(
        self, drawn: tuple[int, int], frames_FxSxSx3: UInt8[np.ndarray, "F S S 3"]
    ) -> dict[str, Any]:
        record, video, _ = self.pairs[drawn[0]]
        text = record["captions"][drawn[1]].decode()
        ids_W, mask_W, is_truncated = self.tokenizer.encode_padded(text)
        fields = {"ids": ids_W, "text_mask": mask_W, "truncated": np.bool_(is_truncated)}
        frame_mask = _decode_frames(record, frames_FxSxSx3, spread=self.format.spread > 0)
        return fields | {"frame_mask": frame_mask, "video": np.int32(video)}


def training_batches(
    pairs: TrainingPairs,
    tokenizer: Tokenizer,
    batch_size: int,
    max_frames: int,
    format: FrameFormat,
    *,
    seed: int,
    start_step: int = 0,
    process: tuple[int, int] = (0, 1),
    readers: Readers = FOUR_THREADS,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Returns endless batches from step `start_step` on, reshuffled in each epoch.

    A global batch has B = `batch_size` pairs; each process, (index, number of processes), gets its
    part. Incomplete batches are dropped. The order and the drawn captions depend on `seed`. Two
    batches are read ahead, by `readers`. `close` of the iterator ends these.

    Yields:
        dict with ids B x W int32, text_mask B x W bool, frames B x F x S x S x 3 uint8, frame_mask
        B x F bool, video B int32 (equal for two captions of a video), truncated B bool.
    """
    index, count = process
    pairs_per_epoch = steps_per_epoch(pairs, batch_size) * batch_size
    stream = grain.MapDataset.range(len(pairs)).seed(seed).shuffle()[:pairs_per_epoch].repeat()
    stream = stream.random_map(pairs.draw_caption)[start_step * batch_size :][index::count]
    read = _BatchReader(pairs, tokenizer, max_frames, format, readers.threads)
    stream = stream.batch(batch_size // count, drop_remainder=True, batch_fn=read)
    batches = stream.to_iter_dataset(_TWO_BATCHES)
    if readers.workers:
        if not flags.FLAGS.is_parsed():  # grain reads some, which only absl.app parses
            flags.FLAGS.mark_as_parsed()
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=readers.workers)
        batches = batches.mp_prefetch(options, _start_worker)
    return iter(batches)


def _start_worker(index: int, count: int) -> None:
    """Makes this worker process end with its parent, and not by a signal to all processes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    # Unloading the libraries would take seconds. 1: an end that grain did not request is an error.
    atexit.register(os._exit, 1)


def evaluation_batches(
    clips: Sequence[Record], batch_size: int, max_frames: int, format: FrameFormat, part: slice
) -> Iterator[tuple[np.ndarray, np.ndarray, list[list[str]], list[str]]]:
    """Yields the clips in `part` of a split in order, in batches (the last may be smaller).

    A batch is (frames B x F x S x S x 3 uint8, frame_mask B x F bool, captions of each clip, ids).
    """

    def make_example(record: Record) -> tuple[Any, ...]:
        captions = [caption.decode() for caption in record["captions"]]
        return *load_frames(record, max_frames, format), captions, record["id"].decode()

    def make_batch(examples: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        frames, masks, captions, ids = zip(*examples, strict=True)
        return np.stack(frames), np.stack(masks), list(captions), list(ids)

    stream = grain.MapDataset.source(clips)[part].map(make_example)
    stream = stream.batch(batch_size, batch_fn=make_batch)
    return iter(stream.to_iter_dataset(_READ_OPTIONS))
