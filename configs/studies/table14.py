"""Table 14: a Transformer over all vectors of a pair instead of AOSM.

    python -m xclip_jax.study --study=configs/studies/table14.py --config=configs/msrvtt.py

The paper shows it in Fig. 6 without details; docs/paper-vs-code.md has our interpretation.
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study. A Transformer over every pair is slow: quadratic in the batch size."""
    del config
    fused = Variant({"model.fusion": "transformer"}, {"ViT-B/32": 38.9, "ViT-B/16": 40.1})
    aosm = Variant({"model.fusion": "mean"}, {"ViT-B/32": 46.1, "ViT-B/16": 49.3})
    return Study(
        title="Table 14: fusion by a Transformer",
        columns=("fusion",),
        variants={"Transformer": fused, "AOSM": aosm},
    )
