"""Whether padding takes part in AOSM: masked (the paper) or not (its release).

python -m xclip_jax.study --study=configs/studies/padding.py --config=configs/msrvtt.py
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """The release lets every position of a text and a video compete."""
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
