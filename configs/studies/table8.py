"""Table 8: with or without the temporal encoder.

python -m xclip_jax.study --study=configs/studies/table8.py --config=configs/msrvtt.py
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study, whose lower half is of --config=configs/msrvtt.py:vit_b16."""
    del config
    without = Variant({"model.temporal.type": "none"}, {"ViT-B/32": 45.2, "ViT-B/16": 48.3})
    encoder = Variant({"model.temporal.type": "transformer"}, {"ViT-B/32": 46.1, "ViT-B/16": 49.3})
    return Study(
        title="Table 8: temporal encoder",
        columns=("temporal encoder",),
        variants={"without": without, "with": encoder},
    )
