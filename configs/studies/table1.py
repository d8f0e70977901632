"""Table 1, the rows with CLIP's encoders: heads that compare their features.

    python -m xclip_jax.study --study=configs/studies/table1.py --config=configs/msrvtt.py

CLIP-straight is not trained: without CLIP's weights its results are at chance level.
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study of CLIP4Clip's heads (https://arxiv.org/abs/2104.08860) and X-CLIP."""
    del config
    zero_shot = {"model.head": "mean_pooling", "train.epochs": 0}
    return Study(
        title="Table 1: heads on the same encoders",
        columns=("method",),
        variants={
            "CLIP-straight": Variant(zero_shot, {"ViT-B/32": 31.2}),
            "CLIP4Clip-meanP": Variant({"model.head": "mean_pooling"}, {"ViT-B/32": 43.1}),
            "CLIP4Clip-seqLSTM": Variant({"model.head": "seq_lstm"}, {"ViT-B/32": 42.5}),
            "CLIP4Clip-seqTransf": Variant({"model.head": "seq_transformer"}, {"ViT-B/32": 44.5}),
            "CLIP4Clip-tightTransf": Variant(
                {"model.head": "tight_transformer"}, {"ViT-B/32": 40.2}
            ),
            "X-CLIP": Variant({"model.head": "xclip"}, {"ViT-B/32": 46.1, "ViT-B/16": 49.3}),
        },
    )
