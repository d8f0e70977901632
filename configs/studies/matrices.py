"""The release's learned matrices, of which the paper says nothing.

python -m xclip_jax.study --study=configs/studies/matrices.py --config=configs/msrvtt.py
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Eight matrices, identities at the start."""
    del config
    return Study(
        title="Learned aggregation matrices",
        columns=("matrices",),
        variants={
            "learned (release)": Variant({"model.matrices": "learned"}),
            "none (paper)": Variant({"model.matrices": "none"}),
        },
    )
