"""ActivityNet Captions (Krishna et al., ICCV 2017): long videos, told sentence by sentence."""

from xclip_jax.data.datasets.files import Folder, checked, fields, is_segment
from xclip_jax.data.datasets.listing import SEGMENT, UNLISTED, Listing

VARIANTS = ("val_1", "val_2")
DOWNLOAD = (
    "unpack https://cs.stanford.edu/people/ranjaykrishna/densevid/captions.zip (captions and "
    "lists) and ask for the videos at http://activity-net.org/download.html"
)
EXPECTED = {"val_1": {"train": 10009, "test": 4917}, "val_2": {"train": 10009, "test": 4885}}
ROUNDING = 0.011  # seconds that a segment may end after its video: both are rounded


def read(annotations, variant="val_1"):
    """ActivityNet Captions' folder, for paragraph retrieval; tested on val_1 (or val_2), as usual.

    A video takes part if it is in the list of ids and has captions. Known to be bad, and so in no
    list: v_WjEh7acrr5o, v_uTc2-oAxgbc, v_LURZ8QDfowU.
    """
    sources = {
        "train": ("train_ids.json", "train.json"),
        "test": ("val_ids.json", f"{variant}.json"),
    }
    folder = Folder(annotations, [name for pair in sources.values() for name in pair], DOWNLOAD)
    listing = Listing(EXPECTED[variant], paragraphs=True)
    for split, (ids_name, name) in sources.items():
        ids_path, ids = folder.json(ids_name, list)
        path, videos = folder.json(name, dict)
        sentences = {}
        for video, item in videos.items():
            kinds = {"duration": int | float, "timestamps": list, "sentences": list}
            duration, times, texts = fields(item, f"{path}, {video}", **kinds)
            sentences[video] = [checked(text, str, f"{path}, {video}") for text in texts]
            if len(times) != len(texts):
                listing.note(SEGMENT, video, f"{len(times)} for {len(texts)} sentences in {name}")
            for pair in times:
                if not is_segment(pair, duration + ROUNDING) or pair[0] == pair[1]:
                    listing.note(SEGMENT, video, f"{pair} of {duration} s in {name}")
        for video in ids:
            listing.add(split, checked(video, str, ids_path), sentences.get(video, ()))
        for video in sorted(sentences.keys() - set(ids)):
            listing.note(UNLISTED, video, f"in {name}, not in {ids_name}")
    return listing
