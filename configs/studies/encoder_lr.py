"""Learning rate of CLIP's towers, in float32 and stored as float16 as in the release.

    python -m xclip_jax.study --study=configs/studies/encoder_lr.py --config=configs/msrvtt.py

All variants use the release's optimizer, whose second moments underflow in float16
(docs/paper-vs-code.md). New parameters have the config's rate.
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study of rates from 1e-7, the paper's, to 1e-5."""
    del config
    variants = {}
    for dtype, rates in (("float32", (1e-7, 1e-6, 1e-5)), ("float16", (1e-7, 1e-6))):
        for rate in rates:
            fields = {"optimizer.name": "bert_adam", "optimizer.encoder_lr": rate}
            fields["model.param_dtype"] = dtype
            name = f"{dtype}, {rate:.0e}".replace("e-0", "e-")
            variants[name] = Variant(fields, cells=(dtype, f"{rate:.0e}".replace("e-0", "e-")))
    return Study(
        title="Learning rate of CLIP's towers",
        columns=("stored as", "encoder rate"),
        variants=variants,
        reference="float32, 1e-7",
    )
