"""LSMDC 2016 (Rohrbach et al., IJCV 2017): clips from films, one sentence each; access is gated."""

from xclip_jax.cli import InputError
from xclip_jax.data.datasets.files import Folder
from xclip_jax.data.datasets.listing import Listing

VARIANTS = ()
DOWNLOAD = (
    "ask for access at https://sites.google.com/site/describingmovies/download, then fetch the "
    "three lists and the clips"
)
EXPECTED = {"train": 109673, "val": 7408, "test": 1000}
FILES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}


def read(annotations):
    """LSMDC's folder: lines of clip id, four times and a sentence, tabs between them, no header.

    The test is the list of 1,000 clips; the 7,408 of the other list only select weights.
    """
    folder = Folder(annotations, list(FILES.values()), DOWNLOAD)
    listing = Listing(EXPECTED)
    for split, name in FILES.items():
        for number, line in enumerate(folder.lines(name), 1):
            cells = line.split("\t")
            if len(cells) != 6:
                raise InputError(
                    f"{folder.path / name}, line {number}: must have 6 fields with tabs between "
                    f"them, has {len(cells)}: another file?"
                )
            listing.add(split, cells[0].strip(), [cells[5]])
    return listing
