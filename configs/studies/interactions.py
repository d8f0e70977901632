"""Token interactions of later papers, and what is trained with them.

python -m xclip_jax.study --study=configs/studies/interactions.py --config=configs/msrvtt.py
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study. AOSM with constant temperature, Eq. 7-13, is the reference."""
    del config
    return Study(
        title="Token interactions",
        columns=("similarity",),
        variants={
            "mean-max (Table 7)": Variant({"model.aggregation": "mean-max"}),
            "MaxSim": Variant({"model.aggregation": "maxsim"}),
            "weighted (WTI)": Variant({"model.aggregation": "weighted"}),
            "weighted, CDCR": Variant({"model.aggregation": "weighted", "loss.cdcr": 0.16}),
            "AOSM, learned temperature": Variant({"model.tau_learned": True}),
            "AOSM, loss of each granularity": Variant({"loss.each_granularity": True}),
            "AOSM": Variant(),
        },
    )
