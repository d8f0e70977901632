"""Reads the released annotation files of five benchmarks, and lists all data sets."""

import collections
import dataclasses
from collections.abc import Callable
from os.path import splitext
from typing import Any

from xclip_jax.cli import InputError, PathLike
from xclip_jax.data import annotations
from xclip_jax.data.annotations import SPLITS, AnnotationFolder, Listing, Split


@dataclasses.dataclass(frozen=True)
class DatasetFormat:
    """The annotation format of a data set."""

    read: Callable[..., Listing]  # from a path, and from a variant if there are any
    download: str  # instructions for downloading the annotations
    variants: tuple[str, ...] = ()  # values of prepare's --split; the first is the default


MSRVTT_COUNTS = {
    "9k": {"train": 9000, "test": 1000},
    "7k": {"train": 7010, "test": 1000},
    "full": {"train": 6513, "val": 497, "test": 2990},
}
MSRVTT_SPLITS: dict[str, Split] = {"train": "train", "validate": "val", "test": "test"}


def read_msrvtt(source: PathLike, variant: str = "9k") -> Listing:
    """Reads MSR-VTT (Xu et al., CVPR 2016): 10,000 clips from the web with 20 captions each.

    Variants 9k and 7k are tested on the 1,000 pairs of 1k-A (Yu et al., ECCV 2018), full on the
    data set's own test split.
    """
    lists = [] if variant == "full" else [f"MSRVTT_train.{variant}.csv", "MSRVTT_JSFUSION_test.csv"]
    names = ["MSRVTT_data.json", *lists]
    folder = AnnotationFolder(source, names, DATASETS["msrvtt"].download)
    path, data = folder.json("MSRVTT_data.json", dict)
    videos, sentences = annotations.require_fields(data, path, videos=list, sentences=list)
    splits: dict[Split, list[str]] = collections.defaultdict(list)
    for number, item in enumerate(videos, 1):
        where = f"{path}, video {number}"
        video, split = annotations.require_fields(item, where, video_id=str, split=str)
        if split not in MSRVTT_SPLITS:
            raise InputError(f"{where}: 'split' is {split!r}, must be one of {[*MSRVTT_SPLITS]}")
        splits[MSRVTT_SPLITS[split]].append(video)
    known = {video for ids in splits.values() for video in ids}
    captions = collections.defaultdict(list)
    for number, item in enumerate(sentences, 1):
        where = f"{path}, sentence {number}"
        video, caption = annotations.require_fields(item, where, video_id=str, caption=str)
        captions[video].append(caption)
    listing = Listing(MSRVTT_COUNTS[variant])
    if variant != "full":
        splits = {"train": [row["video_id"] for row in folder.csv(lists[0], ["video_id"])]}
        for row in folder.csv(lists[1], ["video_id", "sentence"]):
            listing.add("test", row["video_id"], [row["sentence"]])
    for split, ids in splits.items():
        for video in ids:
            listing.add(split, video, captions.get(video, ()))
    for video in sorted(captions.keys() - known):
        detail = f"{len(captions[video])} sentences in {path.name}"
        listing.note(annotations.UNLISTED, video, detail)
    return listing


MSVD_PICKLE, MSVD_JSON = "raw-captions.pkl", "captions_msvd.json"


def read_msvd(source: PathLike) -> Listing:
    """Reads MSVD (Chen and Dolan, ACL 2011): 1,970 clips from YouTube, about 40 captions each.

    Captions come from the released pickle or, without it, from JSON {id: [caption]}.
    """
    lists: dict[Split, str] = {split: f"{split}_list.txt" for split in SPLITS}
    download = DATASETS["msvd"].download
    folder = AnnotationFolder(source, lists.values(), download)
    if (folder.path / MSVD_PICKLE).is_file():
        path, captions = folder.plain_pickle(MSVD_PICKLE)
    else:
        json_folder = AnnotationFolder(source, [MSVD_JSON], f"or {MSVD_PICKLE}; {download}")
        path, captions = json_folder.json(MSVD_JSON, dict)
    annotations.require_type(captions, dict, path)
    listing = Listing({"train": 1200, "val": 100, "test": 670})
    for split, name in lists.items():
        for video in folder.ids(name):
            where = f"{path}, {video}"
            texts = []
            for text in annotations.require_type(captions.get(video, []), list, where):
                words = text if isinstance(text, list) else [text]  # a list in the pickle
                texts.append(" ".join(annotations.require_type(w, str, where) for w in words))
            listing.add(split, video, texts)
    for video in captions:
        if video not in listing.clips_by_id and video not in listing.lost:
            listing.note(annotations.UNLISTED, str(video), f"in {path.name}")
    return listing


LSMDC_FILES: dict[Split, str] = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}


def read_lsmdc(source: PathLike) -> Listing:
    """Reads LSMDC 2016 (Rohrbach et al., IJCV 2017): clips from films, one sentence each.

    A line has a clip id, four times and a sentence, separated by tabs; there is no header. The
    test split is the list of 1,000 clips, the val split the list of 7,408 clips.
    """
    folder = AnnotationFolder(source, LSMDC_FILES.values(), DATASETS["lsmdc"].download)
    listing = Listing({"train": 109673, "val": 7408, "test": 1000})
    for split, name in LSMDC_FILES.items():
        for number, line in enumerate(folder.lines(name), 1):
            cells = line.split("\t")
            if len(cells) != 6:
                problem = f"must have 6 fields separated by tabs, has {len(cells)}; wrong file"
                raise InputError(f"{folder.path / name}, line {number}: {problem}")
            listing.add(split, cells[0].strip(), [cells[5]])
    return listing


def read_didemo(source: PathLike) -> Listing:
    """Reads DiDeMo (Hendricks et al., ICCV 2017): videos from Flickr, for paragraph retrieval.

    An id is a file name that ends in a suffix or a bare dot. Videos are matched without it, since
    some occur with two different suffixes.
    """
    names = [f"{split}_{end}" for split in SPLITS for end in ("data.json", "list.txt")]
    folder = AnnotationFolder(source, names, DATASETS["didemo"].download)
    listing = Listing({"train": 8392, "val": 1065, "test": 1004}, paragraphs=True)
    kinds = {"video": str, "description": str, "times": list, "num_segments": int}
    for split in SPLITS:
        path, items = folder.json(f"{split}_data.json", list)
        captions, seen = collections.defaultdict(list), set()
        for number, item in enumerate(items, 1):
            where = f"{path}, item {number}"
            video, text, times, count = annotations.require_fields(item, where, **kinds)
            number = item.get("annotation_id", f"item {number}")
            if number in seen:
                listing.note(annotations.REPEATED, video, f"annotation {number} in {path.name}")
                continue
            seen.add(number)
            captions[splitext(video)[0]].append(text)
            if invalid := [pair for pair in times if not _is_segment(pair, count - 1)]:
                detail = f"{invalid[0]} of segments 0 to {count - 1} in {path.name}"
                listing.note(annotations.SEGMENT, video, detail)
        ids = folder.ids(f"{split}_list.txt")
        for video in ids:
            listing.add(split, video, captions.get(splitext(video)[0], ()))
        for video in sorted(captions.keys() - {splitext(video)[0] for video in ids}):
            detail = f"in {path.name}, not in {split}_list.txt"
            listing.note(annotations.UNLISTED, video, detail)
    return listing


def _is_segment(times: Any, last: float) -> bool:
    """Returns True if `times` is [start, end] with 0 <= start <= end <= last."""
    is_pair = isinstance(times, list) and len(times) == 2
    numbers = is_pair and all(isinstance(time, int | float) for time in times)
    return numbers and 0 <= times[0] <= times[1] <= last


ACTIVITYNET_COUNTS = {"val_1": 4917, "val_2": 4885}  # videos of the test split
ROUNDING = 0.011  # seconds by which a segment may exceed its video: both are rounded


def read_activitynet(source: PathLike, variant: str = "val_1") -> Listing:
    """Reads ActivityNet Captions (Krishna et al., ICCV 2017): long videos, one paragraph each.

    The test split is val_1, as usual, or val_2. A video needs captions and an entry in the list of
    ids; v_WjEh7acrr5o, v_uTc2-oAxgbc and v_LURZ8QDfowU are corrupted and not in the lists.
    """
    sources: dict[Split, list[str]] = {"train": ["train_ids.json", "train.json"]}
    sources["test"] = ["val_ids.json", f"{variant}.json"]
    names = [*sources["train"], *sources["test"]]
    folder = AnnotationFolder(source, names, DATASETS["activitynet"].download)
    listing = Listing({"train": 10009, "test": ACTIVITYNET_COUNTS[variant]}, paragraphs=True)
    kinds = {"duration": int | float, "timestamps": list, "sentences": list}
    for split, (ids_name, name) in sources.items():
        ids_path, ids = folder.json(ids_name, list)
        path, videos = folder.json(name, dict)
        captions = {}
        for video, item in videos.items():
            where = f"{path}, {video}"
            duration, times, texts = annotations.require_fields(item, where, **kinds)
            captions[video] = [annotations.require_type(text, str, where) for text in texts]
            if len(times) != len(texts):
                detail = f"{len(times)} for {len(texts)} sentences in {name}"
                listing.note(annotations.SEGMENT, video, detail)
            for pair in times:
                if not _is_segment(pair, duration + ROUNDING) or pair[0] == pair[1]:
                    listing.note(annotations.SEGMENT, video, f"{pair} of {duration} s in {name}")
        for video in ids:
            annotations.require_type(video, str, ids_path)
            listing.add(split, video, captions.get(video, ()))
        for video in sorted(captions.keys() - set(ids)):
            listing.note(annotations.UNLISTED, video, f"in {name}, not in {ids_name}")
    return listing


CLIP4CLIP_DATA = "https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0"
DATASETS = {
    "captions": DatasetFormat(annotations.read_captions, "docs/data.md describes the formats"),
    "msrvtt": DatasetFormat(
        read_msrvtt,
        download=f"unpack {CLIP4CLIP_DATA}/msrvtt_data.zip (captions and splits) and "
        "https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip (videos)",
        variants=tuple(MSRVTT_COUNTS),
    ),
    "msvd": DatasetFormat(
        read_msvd,
        download=f"unpack {CLIP4CLIP_DATA}/msvd_data.zip (captions and splits) and "
        "https://www.cs.utexas.edu/users/ml/clamp/videoDescription/YouTubeClips.tar (videos)",
    ),
    "lsmdc": DatasetFormat(
        read_lsmdc,
        download="request access at https://sites.google.com/site/describingmovies/download, then "
        "download the three lists and the clips",
    ),
    "didemo": DatasetFormat(
        read_didemo,
        download="download *_data.json and the videos as described at "
        "https://github.com/LisaAnne/LocalizingMoments, and *_list.txt as described at "
        "https://github.com/albanie/collaborative-experts (misc/datasets/didemo); prepare with "
        "--max_seconds=31, which the PyTorch release reads",
    ),
    "activitynet": DatasetFormat(
        read_activitynet,
        download="unpack https://cs.stanford.edu/people/ranjaykrishna/densevid/captions.zip "
        "(captions and lists) and request the videos at http://activity-net.org/download.html",
        variants=tuple(ACTIVITYNET_COUNTS),
    ),
}
