"""Padding in AOSM: masked as in the paper, or treated like real words and frames as in the release.

python -m xclip_jax.study --study=configs/studies/padding.py --config=configs/msrvtt.py
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study. In the release all tokens and frames take part, padding included."""
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
