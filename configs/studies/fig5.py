"""Fig. 5: number of training videos, for each granularity.

    python -m xclip_jax.study --study=configs/studies/fig5.py --config=configs/msrvtt.py
    python -m xclip_jax.study --study=configs/studies/fig5.py:1000,3000,5000,7000 --config=...

Default: 1/16 and 1/4 of the training videos. All of them are always added. Every run takes about
as many steps as the one on all videos (in whole epochs), so fewer videos do not mean less training.
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
    """Returns the study of `sizes`, comma-separated numbers of videos."""
    dataset = Dataset(config.data.path)
    total = len(dataset.captions_per_clip[config.data.train_split])
    total = min(total, config.data.max_videos or total)
    fractions = [total // divisor for divisor in (16, 4) if total >= divisor]
    numbers = [int(size) for size in sizes.split(",") if size] or fractions
    if not all(0 < number < total for number in numbers):
        raise InputError(f"fig5.py:{sizes}: numbers must be from 1 to {total - 1}")
    variants = {}
    for series, granularities in SERIES.items():
        for number in (*numbers, total):
            overrides = {"model.granularities": granularities}
            if number < total:
                epochs = max(1, round(config.train.epochs * total / number))
                overrides |= {"data.max_videos": number, "train.epochs": epochs}
            variants[f"{series}, {number}"] = Variant(overrides, cells=(series, str(number)))
    return Study(
        title="Fig. 5: number of training videos",
        columns=("granularity", "training videos"),
        variants=variants,
        reference=f"all four, {total}",
        lines=True,
        note="All runs take about the same number of steps.",
    )
