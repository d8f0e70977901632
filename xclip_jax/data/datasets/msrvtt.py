"""MSR-VTT (Xu et al., CVPR 2016): 10,000 clips from the web, 20 captions each."""

import collections

from xclip_jax.cli import InputError
from xclip_jax.data.datasets.files import Folder, fields
from xclip_jax.data.datasets.listing import UNLISTED, Listing

VARIANTS = ("9k", "7k", "full")
DOWNLOAD = (
    "unpack https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip (captions "
    "and splits) and https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip (videos)"
)
EXPECTED = {
    "9k": {"train": 9000, "test": 1000},
    "7k": {"train": 7010, "test": 1000},
    "full": {"train": 6513, "val": 497, "test": 2990},
}
_SPLITS = {"train": "train", "validate": "val", "test": "test"}


def read(annotations, variant="9k"):
    """MSR-VTT's folder. 9k, 7k: tested on the 1,000 pairs of 1k-A (Yu et al., 2018); full: its own.

    Each caption of a training video is a training pair of its own.
    """
    lists = [] if variant == "full" else [f"MSRVTT_train.{variant}.csv", "MSRVTT_JSFUSION_test.csv"]
    folder = Folder(annotations, ["MSRVTT_data.json", *lists], DOWNLOAD)
    path, data = folder.json("MSRVTT_data.json", dict)
    videos, sentences = fields(data, path, videos=list, sentences=list)
    splits, captions = collections.defaultdict(list), collections.defaultdict(list)
    for number, item in enumerate(videos, 1):
        video, split = fields(item, f"{path}, video {number}", video_id=str, split=str)
        if split not in _SPLITS:
            raise InputError(f"{path}, video {number}: 'split' is {split!r}, none of {[*_SPLITS]}")
        splits[_SPLITS[split]].append(video)
    for number, item in enumerate(sentences, 1):
        video, caption = fields(item, f"{path}, sentence {number}", video_id=str, caption=str)
        captions[video].append(caption)
    known = {video for ids in splits.values() for video in ids}
    listing = Listing(EXPECTED[variant])
    if variant != "full":
        _, rows = folder.csv(lists[0], ["video_id"])
        splits = {"train": [row["video_id"] for row in rows]}
        for row in folder.csv(lists[1], ["video_id", "sentence"])[1]:
            listing.add("test", row["video_id"], [row["sentence"]])
    for split, ids in splits.items():
        for video in ids:
            listing.add(split, video, captions.get(video, ()))
    for video in sorted(captions.keys() - known):
        listing.note(UNLISTED, video, f"{len(captions[video])} sentences in {path.name}")
    return listing
