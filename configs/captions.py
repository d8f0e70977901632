"""One's own videos and captions, from scratch.

    python -m xclip_jax.prepare --dataset=captions --videos=clips/ \
        --annotations=captions.csv --output=data/mine
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine

A small X-CLIP with random weights, on the 224-pixel frames that CLIP wants: enough to memorise a
few hundred clips, on a CPU too.
"""

from xclip_jax import config


def get_config():
    """Small towers; a batch that suits few clips, and enough epochs for them."""
    c = config.get_config()
    c.name = "captions"

    model = c.model
    model.embed_dim = 128
    model.vision.update(width=128, layers=3, heads=4)
    model.text.update(vocab_size=0, width=128, layers=3, heads=4)
    model.temporal.update(layers=2, heads=4)

    c.train.update(batch_size=16, epochs=60)
    c.loss.same_video = "ignore"  # few videos: two captions of one often meet in a batch
    c.optimizer.update(lr=1e-3, encoder_lr=1e-3, weight_decay=0.1)
    return c
