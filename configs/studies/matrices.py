"""Learned aggregation matrices, which the release has and the paper does not mention.

python -m xclip_jax.study --study=configs/studies/matrices.py --config=configs/msrvtt.py
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study of the eight matrices, initialised to the identity."""
    del config
    return Study(
        title="Learned aggregation matrices",
        columns=("matrices",),
        variants={
            "learned (release)": Variant({"model.matrices": True}),
            "none (paper)": Variant({"model.matrices": False}),
        },
    )
