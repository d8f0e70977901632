"""Table 14: a Transformer over all vectors of a pair in the place of AOSM.

    python -m xclip_jax.study --study=configs/studies/table14.py --config=configs/msrvtt.py

The paper draws it (Fig. 6) but does not specify it: our reading is in docs/paper-vs-code.md.
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """A Transformer for every pair: slow, and its memory grows with the square of the batch."""
    del config
    fused = Variant({"model.fusion": "transformer"}, {"ViT-B/32": 38.9, "ViT-B/16": 40.1})
    aosm = Variant({"model.fusion": "mean"}, {"ViT-B/32": 46.1, "ViT-B/16": 49.3})
    return Study(
        title="Table 14: fusion by a Transformer",
        columns=("fusion",),
        variants={"Transformer": fused, "AOSM": aosm},
    )
