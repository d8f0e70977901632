"""Tests of batches: content, order, each pair once per epoch, start at any step."""

import itertools
from collections import Counter

import numpy as np
import pytest

from xclip_jax.cli import InputError
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import (
    TrainingPairs,
    choose_frames,
    evaluation_batches,
    load_frames,
    steps_per_epoch,
    training_batches,
)
from xclip_jax.data.preprocess import FrameFormat, encode_jpeg
from xclip_jax.data.text import learn_tokenizer

SIDE, MAX_FRAMES = 16, 4
COUNTS = [1, 3, 2, 5, 1, 4, 2, 3, 1, 3, 2]  # captions of each video: 27 pairs
NUM_FRAMES = [1, 2, 3, 4, 5, 6, 7, 9, 1, 4, 12]
LETTERS = "abcdefghijk"


def caption(video, number):
    """Returns a text that encodes both: the letter of the video, number + 1 times."""
    return " ".join(LETTERS[video] * (number + 1))


def level(video, frame):
    return 10 + 20 * video + frame


class FakeDataset(Dataset):
    """A data set in memory. The brightness of a frame encodes its video and its number."""

    def __init__(self):
        self.captions_per_clip = {"train": np.array(COUNTS)}

        def jpeg(value):
            return encode_jpeg(np.full((SIDE, SIDE, 3), value, np.uint8))

        self._clips = [
            {
                "id": LETTERS[v].encode(),
                "captions": np.array([caption(v, n).encode() for n in range(COUNTS[v])], object),
                "frames": [jpeg(level(v, n)) for n in range(NUM_FRAMES[v])],
            }
            for v in range(len(COUNTS))
        ]

    def clips(self, split):
        assert split == "train"
        return self._clips


DATASET = FakeDataset()
TOKENIZER = learn_tokenizer([], max_words=6)
LETTER_OF = {TOKENIZER.encode(letter)[0]: letter for letter in LETTERS}


def batches(count, captions="all", batch_size=4, seed=0, start_step=0, process=(0, 1)):
    pairs = TrainingPairs(DATASET, "train", captions)
    stream = training_batches(
        pairs,
        TOKENIZER,
        batch_size,
        MAX_FRAMES,
        FrameFormat(SIDE),
        seed=seed,
        start_step=start_step,
        process=process,
    )
    return list(itertools.islice(stream, count))


def pairs_of(some_batches):
    """Returns (video, caption number) of every row, decoded from the token ids."""
    return [
        (LETTERS.index(LETTER_OF[ids[1]]), int(mask.sum()) - 3)
        for batch in some_batches
        for ids, mask in zip(batch["ids"], batch["text_mask"], strict=True)
    ]


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], name)


@pytest.mark.parametrize(
    ("num_frames", "max_frames", "chosen"),
    [
        (1, 4, [0]),
        (3, 4, [0, 1, 2]),
        (4, 4, [0, 1, 2, 3]),
        (5, 4, [0, 1, 2, 4]),
        (12, 4, [0, 3, 7, 11]),
        (100, 12, [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]),
        (30, 12, [0, 2, 5, 7, 10, 13, 15, 18, 21, 23, 26, 29]),
        (9, 1, [0]),
        (9, 2, [0, 8]),
    ],
)
def test_chosen_frames_are_uniform(num_frames, max_frames, chosen):
    assert choose_frames(num_frames, max_frames).tolist() == chosen


@pytest.mark.parametrize("video", range(len(COUNTS)))
def test_frames_are_decoded_and_padded(video):
    frames, mask = load_frames(DATASET.clips("train")[video], MAX_FRAMES, FrameFormat(SIDE))
    assert (frames.shape, frames.dtype) == ((MAX_FRAMES, SIDE, SIDE, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((MAX_FRAMES,), np.bool_)
    chosen = choose_frames(NUM_FRAMES[video], MAX_FRAMES)
    assert mask.tolist() == [n < len(chosen) for n in range(MAX_FRAMES)]
    assert not frames[~mask].any()
    for frame, number in zip(frames, chosen, strict=False):
        assert np.abs(frame.astype(int) - level(video, number)).max() <= 1


def test_batch_shapes_and_dtypes():
    (batch,) = batches(1)
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        "ids": ((4, 6), "int32"),
        "text_mask": ((4, 6), "bool"),
        "frames": ((4, MAX_FRAMES, SIDE, SIDE, 3), "uint8"),
        "frame_mask": ((4, MAX_FRAMES), "bool"),
        "video": ((4,), "int32"),
        "truncated": ((4,), "bool"),
    }


@pytest.mark.parametrize("captions", ["all", "random"])
def test_captions_and_frames_belong_to_the_video(captions):
    found = batches(20, captions)
    rows = pairs_of(found)
    assert [video for video, _ in rows] == np.concatenate([b["video"] for b in found]).tolist()
    frames = np.concatenate([batch["frames"] for batch in found])
    masks = np.concatenate([batch["frame_mask"] for batch in found])
    for (video, _), clip, mask in zip(rows, frames, masks, strict=True):
        expected, expected_mask = load_frames(
            DATASET.clips("train")[video], MAX_FRAMES, FrameFormat(SIDE)
        )
        np.testing.assert_array_equal(clip, expected)
        np.testing.assert_array_equal(mask, expected_mask)


def test_truncated_captions_are_marked():
    (batch,) = batches(1, batch_size=27)
    # 6 positions hold 4 words; only video d has a caption of 5.
    assert [LETTERS[video] for video in batch["video"][batch["truncated"]]] == ["d"]
    assert batch["text_mask"][batch["truncated"]].all()


def test_epochs_use_pairs_at_most_once_in_different_orders():
    steps = steps_per_epoch(TrainingPairs(DATASET, "train", "all"), 4)
    assert steps == 27 // 4
    found = batches(5 * steps, batch_size=4)
    epochs = [pairs_of(found[n * steps : (n + 1) * steps]) for n in range(5)]
    for epoch in epochs:
        assert len(epoch) == 24
        repeated = [pair for pair, count in Counter(epoch).items() if count > 1]
        assert repeated in ([], [(3, 3)])  # the caption of 5 words is cut to that of 4
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert len({frozenset(epoch) for epoch in epochs}) > 1  # not always the same left out


def test_epoch_without_remainder_has_all_pairs():
    expected = sorted((v, min(n, 3)) for v, count in enumerate(COUNTS) for n in range(count))
    for start in (0, 9, 18):
        assert sorted(pairs_of(batches(9, batch_size=3, start_step=start))) == expected
    assert len(TrainingPairs(DATASET, "train", "all")) == 27


@pytest.mark.parametrize("captions", ["all", "random"])
def test_max_videos_is_a_fixed_subset_of_a_larger_one(captions):
    def pairs(count):
        source = TrainingPairs(DATASET, "train", captions, count)
        return [
            (v, record["id"], n) for record, v, n in map(source.__getitem__, range(len(source)))
        ]

    whole, parts = pairs(0), [pairs(count) for count in (11, 7, 3)]
    assert parts[0] == pairs(99) == whole
    assert pairs(3) == parts[2]
    for count, larger, part in zip((7, 3), parts, parts[1:], strict=False):
        assert set(part) < set(larger)
        videos = {video for video, _, _ in part}
        assert len(videos) == count
        assert sorted(part) == sorted(pair for pair in whole if pair[0] in videos)
        assert all(name == LETTERS[video].encode() for video, name, _ in part)


def test_random_captions_give_one_pair_per_video_and_epoch():
    assert len(TrainingPairs(DATASET, "train", "random")) == 11
    drawn = [set() for _ in COUNTS]
    for epoch in batches(40, "random", batch_size=11):
        rows = pairs_of([epoch])
        assert sorted(video for video, _ in rows) == list(range(11))
        for video, number in rows:
            drawn[video].add(number)
    assert drawn == [set(range(min(count, 4))) for count in COUNTS]


@pytest.mark.parametrize("captions", ["all", "random"])
def test_order_depends_only_on_the_seed(captions):
    assert_same(batches(8, captions, seed=3), batches(8, captions, seed=3))
    one, other = (pairs_of(batches(8, captions, seed=seed)) for seed in (3, 4))
    assert one != other


@pytest.mark.parametrize("captions", ["all", "random"])
@pytest.mark.parametrize("start_step", [1, 5, 6, 7, 13])
def test_start_step_equals_skipping_batches(captions, start_step):
    assert_same(batches(4, captions, start_step=start_step), batches(start_step + 4, captions)[-4:])


@pytest.mark.parametrize("captions", ["all", "random"])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_divide_the_global_batch(captions, count):
    whole = batches(8, captions, start_step=3)
    shares = [batches(8, captions, start_step=3, process=(n, count)) for n in range(count)]
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            parts = [share[step][name] for share in shares]
            assert all(len(part) == 4 // count for part in parts)
            together = np.stack(parts, 1).reshape(array.shape)  # row i is of process i % count
            np.testing.assert_array_equal(together, array)


def test_batch_larger_than_the_data_is_an_error():
    message = r"^config\.train\.batch_size = 28: must be at most the 27 training pairs of the data"
    with pytest.raises(InputError, match=message):
        batches(1, batch_size=28)
    with pytest.raises(InputError, match="must be at most the 11 training pairs"):
        batches(1, "random", batch_size=12)
    assert len(pairs_of(batches(1, batch_size=27))) == 27


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4, 3]), (11, [11]), (64, [11])])
def test_evaluation_is_complete_and_in_order(batch_size, sizes):
    clips = DATASET.clips("train")
    found = list(evaluation_batches(clips, batch_size, MAX_FRAMES, FrameFormat(SIDE), slice(None)))
    assert [len(frames) for frames, *_ in found] == sizes
    frames, masks, captions, ids = (
        [x for batch in found for x in batch[field]] for field in range(4)
    )
    assert ids == list(LETTERS)
    assert captions == [[caption(v, n) for n in range(COUNTS[v])] for v in range(len(COUNTS))]
    for clip, got, mask in zip(DATASET.clips("train"), frames, masks, strict=True):
        expected, expected_mask = load_frames(clip, MAX_FRAMES, FrameFormat(SIDE))
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(mask, expected_mask)
