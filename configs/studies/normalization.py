"""Dual softmax and QB-Norm on top of the same model: no run beyond the plain one is trained.

    python -m xclip_jax.study --study=configs/studies/normalization.py --config=configs/msrvtt.py

Both look at more than one query at a time; see docs/data.md.
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """QB-Norm has text to video alone, by a bank of 1,000 training captions."""
    del config
    return Study(
        title="Test-time normalisation",
        columns=("similarities",),
        variants={
            "dual softmax": Variant({"eval.dual_softmax": True}),
            "QB-Norm": Variant({"eval.qb_norm": 1000}),
            "plain": Variant(),
        },
    )
