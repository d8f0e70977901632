"""Losses and training recipes: sigmoid loss, average of the weights, layer-wise learning rates.

python -m xclip_jax.study --study=configs/studies/recipes.py --config=configs/msrvtt.py
"""

from xclip_jax.study import Study, Variant


def get_study(config):
    """Returns the study. The softmax loss (Eq. 15-17) without the others is the reference."""
    del config
    return Study(
        title="Losses and training recipes",
        columns=("recipe",),
        variants={
            "sigmoid loss": Variant({"loss.kind": "sigmoid"}),
            "average of the weights": Variant({"train.ema": 0.98}),
            "layer decay 0.7": Variant({"optimizer.layer_decay": 0.7}),
            "softmax loss": Variant(),
        },
    )
