"""Dual softmax, QB-Norm and the hubness bias with the same weights, without further training.

    python -m xclip_jax.study --study=configs/studies/normalization.py --config=configs/msrvtt.py

Dual softmax uses all test queries at once, the other two a bank of training captions.
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study.

    QB-Norm and the hubness bias apply to text to video only, with a bank of 1,000 captions.
    """
    del config
    return Study(
        title="Test-time normalisation",
        columns=("similarities",),
        variants={
            "dual softmax": Variant({"eval.dual_softmax": True}),
            "QB-Norm": Variant({"eval.qb_norm": 1000}),
            "hubness bias": Variant({"eval.hubness_bias": 1000}),
            "plain": Variant(),
        },
    )
