"""DiDeMo (Hendricks et al., ICCV 2017): videos from Flickr; the captions of one are a paragraph."""

import collections

from xclip_jax.data.datasets.files import Folder, fields, is_segment
from xclip_jax.data.datasets.listing import REPEATED, SEGMENT, SPLITS, UNLISTED, Listing

VARIANTS = ()
DOWNLOAD = (
    "fetch *_data.json and the videos as https://github.com/LisaAnne/LocalizingMoments says, and "
    "*_list.txt as https://github.com/albanie/collaborative-experts (misc/datasets/didemo) says; "
    "prepare with --max_seconds=31, as the release reads it"
)
EXPECTED = {"train": 8392, "val": 1065, "test": 1004}


def read(annotations):
    """DiDeMo's folder, for paragraph retrieval.

    An id is a file name, with a suffix, some with a bare dot; it is known by what comes before
    the last dot, for some videos go by two suffixes.
    """
    names = [f"{split}_{end}" for split in SPLITS for end in ("data.json", "list.txt")]
    folder = Folder(annotations, names, DOWNLOAD)
    listing = Listing(EXPECTED, paragraphs=True)
    for split in SPLITS:
        path, items = folder.json(f"{split}_data.json", list)
        captions, seen = collections.defaultdict(list), set()
        for number, item in enumerate(items, 1):
            kinds = {"video": str, "description": str, "times": list, "num_segments": int}
            video, text, times, last = fields(item, f"{path}, item {number}", **kinds)
            number = item.get("annotation_id", f"item {number}")
            if number in seen:
                listing.note(REPEATED, video, f"annotation {number} in {path.name}")
                continue
            seen.add(number)
            captions[_stem(video)].append(text)
            odd = [pair for pair in times if not is_segment(pair, last - 1)]
            if odd:
                listing.note(SEGMENT, video, f"{odd[0]} of segments 0 to {last - 1} in {path.name}")
        ids = folder.ids(f"{split}_list.txt")
        for video in ids:
            listing.add(split, video, captions.get(_stem(video), ()))
        for video in sorted(captions.keys() - set(map(_stem, ids))):
            listing.note(UNLISTED, video, f"in {path.name}, not in {split}_list.txt")
    return listing


def _stem(video):
    return video.rpartition(".")[0] or video
