"""Fig. 5: how many training videos each granularity needs.

    python -m xclip_jax.study --study=configs/studies/fig5.py --config=configs/msrvtt.py
    python -m xclip_jax.study --study=configs/studies/fig5.py:1000,3000,5000,7000 --config=...

Without numbers: a sixteenth and a quarter of the training videos; all of them are always added.
Every run takes about as many steps as the one on all videos (in whole epochs), so that fewer videos
are not also less training.
"""

from xclip_jax.cli import InputError
from xclip_jax.data.builder import Dataset
from xclip_jax.similarity import GRANULARITIES
from xclip_jax.study import Study, Variant

SERIES = {
    "all four": GRANULARITIES,
    "sentence-video": ("video_sentence",),
    "sentence-frame": ("frame_sentence",),
    "word-video": ("video_word",),
    "word-frame": ("frame_word",),
}


def get_study(config, sizes=""):
    """`sizes`: numbers of videos, with commas between them."""
    dataset = Dataset(config.data.path)
    everything = len(dataset.captions_per_clip[config.data.train_split])
    everything = min(everything, config.data.max_videos or everything)
    shares = [everything // share for share in (16, 4) if everything >= share]
    numbers = [int(size) for size in sizes.split(",") if size] or shares
    if not all(0 < number < everything for number in numbers):
        raise InputError(f"fig5.py:{sizes}: numbers must be from 1 to {everything - 1}")
    variants = {}
    for series, granularities in SERIES.items():
        for number in (*numbers, everything):
            overrides = {"model.granularities": granularities}
            if number < everything:
                epochs = max(1, round(config.train.epochs * everything / number))
                overrides |= {"data.max_videos": number, "train.epochs": epochs}
            variants[f"{series}, {number}"] = Variant(overrides, cells=(series, str(number)))
    return Study(
        title="Fig. 5: number of training videos",
        columns=("granularity", "training videos"),
        variants=variants,
        reference=f"all four, {everything}",
        lines=True,
        note="All runs take about the same number of steps.",
    )
