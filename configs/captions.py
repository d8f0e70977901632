"""Your own videos and captions, from random weights.

    python -m xclip_jax.prepare --dataset=captions --videos=clips/ \
        --annotations=captions.csv --output=data/mine
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine

A small X-CLIP on frames of 224 pixels, the size that CLIP uses. It memorises a few hundred clips,
even on a CPU. To start from trained encoders instead, convert them (docs/encoders.md), prepare the
frames for them and name them:

    python -m xclip_jax.prepare --model=models/siglip2_b16 --dataset=captions --videos=clips/ \
        --annotations=captions.csv --output=data/mine
    python -m xclip_jax.main --config=configs/captions.py:siglip2_b16 --config.data.path=data/mine

Names: vit_b32, vit_b16 (OpenAI's CLIP in models/clip_b32, models/clip_b16), siglip2_b16,
siglip2_l16, pe_b16, pe_l14, videoprism_b, videoprism_l (in models/NAME), or own, for any other
(--config.init.clip=DIR).
Training starts at their zero-shot accuracy with X-CLIP's similarity: there is no temporal encoder,
which a few clips could not train.
"""

from typing import Any

from xclip_jax import config
from xclip_jax.cli import InputError
from xclip_jax.models.families import PUBLISHED

ENCODERS = (*config.BACKBONES, *PUBLISHED, "own")


def get_config(encoders: str = "") -> Any:
    """Returns small towers from random weights, or the encoders of ENCODERS, for few clips."""
    c = config.get_config()
    if encoders and encoders not in ENCODERS:
        rule = f"after the colon must be one of {', '.join(ENCODERS)}"
        raise InputError(f"--config=configs/captions.py:{encoders}: {rule}")
    c.name = "captions"
    c.train.batch_size = 16
    c.loss.same_video = "ignore"  # with few videos, a batch often has two captions of one
    if encoders:
        c.name += f"_{encoders}"
        if encoders == "own":
            c.init.clip = "models/own"
        else:
            config.set_encoders(c, encoders)
        c.model.temporal.type = "none"  # starts at the encoders' own accuracy
        c.train.epochs = 10
        c.optimizer.update(lr=1e-4, encoder_lr=1e-6)
        return c

    model = c.model
    model.embed_dim = 128
    model.vision.update(width=128, layers=3, heads=4)
    model.text.update(vocab_size=0, width=128, layers=3, heads=4)
    model.temporal.update(layers=2, heads=4)

    c.train.epochs = 60
    c.optimizer.update(lr=1e-3, encoder_lr=1e-3, weight_decay=0.1)
    return c
