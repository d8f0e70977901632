"""Frame features that are compared with texts: before or after the temporal encoder.

python -m xclip_jax.study --study=configs/studies/frame_features.py --config=configs/msrvtt.py
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study. Eq. 1 uses the features after the encoder, the release those before."""
    del config
    return Study(
        title="Frame features before or after the temporal encoder",
        columns=("frame features",),
        variants={
            "before (release)": Variant({"model.frame_features": "clip"}),
            "after (Eq. 1)": Variant({"model.frame_features": "temporal"}),
        },
    )
