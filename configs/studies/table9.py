"""Table 9: temperature of AOSM.

python -m xclip_jax.study --study=configs/studies/table9.py --config=configs/msrvtt.py
"""

from xclip_jax.study import Study, Variant

PAPER = {1.0: 43.9, 0.1: 45.2, 0.01: 46.1, 0.001: 45.6}


def get_study(config):
    """Returns the study with rows in the paper's order."""
    del config
    return Study(
        title="Table 9: temperature of AOSM",
        columns=("τ",),
        variants={
            f"{tau:g}": Variant({"model.tau": tau}, {"ViT-B/32": recall})
            for tau, recall in PAPER.items()
        },
        reference="0.01",
    )
