"""The input pipeline: prepared clips -> batches of arrays, by grain.

Deterministic by seed. Step n's global batch is the same for any number of processes, and a run is
resumed by building the pipeline at step n: nothing of the iterator needs saving.
"""

import grain
import numpy as np

from xclip_jax.cli import InputError
from xclip_jax.data.video import decode_jpeg


def choose_frames(num_frames, max_frames):
    """Indices of the frames to use: all, or `max_frames` spaced uniformly from first to last."""
    if num_frames <= max_frames:
        return np.arange(num_frames)
    return np.linspace(0, num_frames - 1, max_frames).astype(int)


def load_frames(record, max_frames, image_size):
    """Decodes a record's frames.

    Returns:
        (frames_FxSxSx3 uint8, mask_F bool, True = real): F is max_frames, padding is 0.
    """
    chosen = choose_frames(len(record["frames"]), max_frames)
    frames_FxSxSx3 = np.zeros((max_frames, image_size, image_size, 3), np.uint8)
    for place, index in enumerate(chosen):
        frames_FxSxSx3[place] = decode_jpeg(record["frames"][index])
    return frames_FxSxSx3, np.arange(max_frames) < len(chosen)


class TrainingPairs:
    """The (caption, video) pairs of a split, as grain's random access source wants them.

    With captions="all" each caption is a pair of its own; with "random" there is one pair a video,
    its caption drawn by `choose_caption`. An item is (record, video, caption number or None).
    At most `max_videos` are used, always the same ones, a smaller number's among a larger one's;
    0: all.
    """

    def __init__(self, dataset, split, captions, max_videos=0):
        self._clips = dataset.clips(split)
        counts = dataset.captions_per_clip[split]
        drawn = np.random.default_rng(0).permutation(len(counts))[: max_videos or None]
        self._videos = np.sort(drawn)
        self._ends = np.cumsum(counts[self._videos])
        self._all = captions == "all"

    def __len__(self):
        return int(self._ends[-1]) if self._all else len(self._ends)

    def __getitem__(self, index):
        place = int(np.searchsorted(self._ends, index, side="right")) if self._all else index
        video = int(self._videos[place])
        caption = index - int(self._ends[place]) if self._all else None  # counted from the last
        return self._clips[video], video, caption


def choose_caption(item, rng):
    """Draws the caption of a pair that has none yet."""
    record, video, caption = item
    if caption is None:
        caption = int(rng.integers(len(record["captions"])))
    return record, video, caption


def steps_per_epoch(pairs, batch_size):
    """Whole batches in one pass over the pairs.

    Raises:
        InputError: there is not even one.
    """
    if len(pairs) < batch_size:
        raise InputError(
            f"config.train.batch_size = {batch_size}: must be at most the {len(pairs)} training "
            "pairs of the data set"
        )
    return len(pairs) // batch_size


def training_batches(
    pairs, tokenizer, batch_size, max_frames, image_size, seed, start_step=0, process=(0, 1)
):
    """Endless batches, shuffled anew each epoch, incomplete ones left out, from `start_step` on.

    Args:
        pairs: TrainingPairs.
        tokenizer: gives ids and mask, see data/text.py.
        batch_size: B, pairs over all processes.
        process: (this process's number, how many there are).

    Yields:
        dict with ids B x W int32, text_mask B x W bool, frames B x F x S x S x 3 uint8, frame_mask
        B x F bool, video B int32 (two captions of one video share it), truncated B bool; for this
        process's share of B.
    """
    number, count = process

    def example(item):
        record, video, caption = item
        text = record["captions"][caption].decode()
        ids_1xW, mask_1xW = tokenizer([text])
        frames, frame_mask = load_frames(record, max_frames, image_size)
        return {
            "ids": ids_1xW[0],
            "text_mask": mask_1xW[0],
            "frames": frames,
            "frame_mask": frame_mask,
            "video": np.int32(video),
            "truncated": np.bool_(tokenizer.truncated(text)),
        }

    steps = steps_per_epoch(pairs, batch_size)
    stream = grain.MapDataset.source(pairs).seed(seed).shuffle()[: steps * batch_size]
    stream = stream.repeat().random_map(choose_caption)[start_step * batch_size :]
    stream = stream[number::count].map(example).batch(batch_size // count, drop_remainder=True)
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)))


def evaluation_batches(clips, batch_size, max_frames, image_size, part=slice(None)):
    """The clips of a split in order, decoded ahead by threads; the last batch may be smaller.

    `part`: which of them.

    Yields:
        (frames B x F x S x S x 3, frame_mask B x F, captions: B lists of str, ids: B str).
    """

    def example(record):
        return (
            *load_frames(record, max_frames, image_size),
            [caption.decode() for caption in record["captions"]],
            record["id"].decode(),
        )

    def batch(examples):
        frames, masks, *lists = zip(*examples, strict=True)
        return np.stack(frames), np.stack(masks), *map(list, lists)

    stream = grain.MapDataset.source(clips)[part].map(example).batch(batch_size, batch_fn=batch)
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)))
