"""MSVD (Chen and Dolan, ACL 2011): 1,970 clips from YouTube, about 40 captions each."""

from xclip_jax.data.datasets.files import Folder, checked
from xclip_jax.data.datasets.listing import SPLITS, UNLISTED, Listing

VARIANTS = ()
DOWNLOAD = (
    "unpack https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msvd_data.zip (captions "
    "and splits) and https://www.cs.utexas.edu/users/ml/clamp/videoDescription/YouTubeClips.tar"
)
EXPECTED = {"train": 1200, "val": 100, "test": 670}
PICKLE, JSON = "raw-captions.pkl", "captions_msvd.json"


def read(annotations):
    """MSVD's folder; captions from the released pickle or, without it, from JSON {id: [caption]}.

    Every caption of a video counts, in training and in the test.
    """
    lists = [f"{split}_list.txt" for split in SPLITS]
    folder = Folder(annotations, lists, DOWNLOAD)
    if (folder.path / PICKLE).is_file():
        path, captions = folder.plain_pickle(PICKLE)
    else:
        path, captions = Folder(annotations, [JSON], f"or {PICKLE}; {DOWNLOAD}").json(JSON, dict)
    checked(captions, dict, path)
    listing = Listing(EXPECTED)
    unlisted = dict(captions)
    for split, name in zip(SPLITS, lists, strict=True):
        for video in folder.ids(name):
            unlisted.pop(video, None)
            texts = checked(captions.get(video, []), list, f"{path}, {video}")
            listing.add(split, video, [_sentence(text, f"{path}, {video}") for text in texts])
    for video in unlisted:
        listing.note(UNLISTED, str(video), f"in {path.name}")
    return listing


def _sentence(text, where):
    """A caption, which the pickle holds as a list of words."""
    words = [checked(word, str, where) for word in text] if isinstance(text, list) else [text]
    return " ".join(checked(word, str, where) for word in words)
