"""Padding in AOSM: masked (the paper) or competing with real words and frames (its release).

python -m xclip_jax.study --study=configs/studies/padding.py --config=configs/msrvtt.py
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study; in the release every position of a text and a video competes."""
    del config
    masked = {"model.padding": "masked", "model.words": "word_tokens"}
    padded = {"model.padding": "competes", "model.words": "word_tokens"}
    everything = {"model.padding": "competes", "model.words": "all_tokens"}
    return Study(
        title="Padding in AOSM",
        columns=("takes part in AOSM",),
        variants={
            "everything (release)": Variant(everything),
            "words, frames and padding": Variant(padded),
            "words and frames": Variant(masked),
        },
    )
