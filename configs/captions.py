"""One's own videos and captions, from scratch.

    python -m xclip_jax.prepare --dataset=captions --videos=clips/ \
        --annotations=captions.csv --output=data/mine --image_size=64
    python -m xclip_jax.main --config=configs/captions.py --config.data.path=data/mine
"""

from xclip_jax import config


def get_config():
    """Sizes and batch for small sets."""
    c = config.get_config()
    c.name = "captions"
    return c
