"""Small trees of parameters and the options of an optimizer, for tests."""

import flax
import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax.models.config import ModelConfig, TemporalConfig, TextConfig, VisionConfig
from xclip_jax.models.xclip import XClip


def params_of(temporal, layers=1):
    """Returns the shapes of a small X-CLIP's parameters."""
    config = ModelConfig(
        vision=VisionConfig(image_size=4, patch_size=2, width=4, layers=layers, heads=1),
        text=TextConfig(vocab_size=5, context_length=4, width=4, layers=layers, heads=1),
        temporal=TemporalConfig(temporal, layers=1, heads=1),
        embed_dim=4,
    )
    model = XClip(config.resolve())
    ids, frames = np.ones((1, 4), np.int32), np.zeros((1, 2, 4, 4, 3), np.uint8)
    masks = np.ones((1, 4), bool), np.ones((1, 2), bool)
    inputs = ids, masks[0], frames, masks[1]
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def flatten(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat):
    """Returns the tree of float32 arrays."""
    flat = {name: jnp.asarray(value, jnp.float32) for name, value in flat.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def true_names(mask):
    return {name for name, value in flatten(mask).items() if value}


# A tree with every special case, and its PyTorch names, one per layer.
SHAPES = {
    "clip/logit_scale": (),
    "clip/visual/class_token": (3,),
    "clip/visual/encoder/blocks/attention/qkv/kernel": (2, 4, 3, 2, 2),
    "clip/visual/encoder/blocks/attention/qkv/bias": (2, 3, 2, 2),
    "clip/visual/encoder/blocks/ln_1/norm/scale": (2, 3),
    "temporal_encoder/encoder/blocks/fc/kernel": (3, 3, 2),
    "temporal_encoder/encoder/blocks/fc/bias": (3, 2),
    "temporal_encoder/positions": (4, 3),
    "temporal_encoder/input/bias": (5,),
    "temporal_encoder/hidden_bias": (5,),
}


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return unflatten({name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()})


def slices(tree):
    """Returns a flat dict in which stacked arrays are split by layer."""
    flat = {}
    for name, value in flatten(tree).items():
        if "/blocks/" in name:
            flat |= {f"{name}/{layer}": part for layer, part in enumerate(value)}
        else:
            flat[name] = value
    return flat


def make_options(lr, encoder_ratio, weight_decay, warmup, clip_norm):
    rates = {"lr": lr, "encoder_lr": lr * encoder_ratio, "weight_decay": weight_decay}
    return {**rates, "warmup": warmup, "b1": 0.9, "b2": 0.98, "eps": 1e-6, "clip_norm": clip_norm}
