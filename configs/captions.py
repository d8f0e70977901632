"""Your own videos and captions, from random weights.

    python -m xclip_jax.prepare --dataset=captions --videos=clips/ \
        --annotations=captions.csv --output=data/mine
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine

A small X-CLIP on frames of 224 pixels, the size that CLIP uses. It memorises a few hundred clips,
even on a CPU.
"""

from typing import Any

from xclip_jax import config


def get_config() -> Any:
    """Returns small towers, and a batch and epochs that suit few clips."""
    c = config.get_config()
    c.name = "captions"

    model = c.model
    model.embed_dim = 128
    model.vision.update(width=128, layers=3, heads=4)
    model.text.update(vocab_size=0, width=128, layers=3, heads=4)
    model.temporal.update(layers=2, heads=4)

    c.train.update(batch_size=16, epochs=60)
    c.loss.same_video = "ignore"  # with few videos, a batch often has two captions of one
    c.optimizer.update(lr=1e-3, encoder_lr=1e-3, weight_decay=0.1)
    return c
