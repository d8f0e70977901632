"""Reads the published .npz files of VideoPrism-LvT, without TensorFlow."""

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xclip_jax.cli import InputError, first_line
from xclip_jax.convert.settings import Settings
from xclip_jax.models.config import PreprocessConfig
from xclip_jax.models.families import VIDEOPRISM, VIDEOPRISM_PREPROCESS

SENTENCEPIECE_URL = (  # "c4_en" of the original code
    "https://storage.googleapis.com/t5-data/vocabs/cc_en.32000/sentencepiece.model"
)
_TEMPERATURE = 0.01  # of the cosines, not in the file: that of the original's demo
_SOURCE = "VideoPrism-LvT"
_STACKS = {
    "vision_encoder/spatial_encoder/transformers_stack": "visual.transformer",
    "vision_encoder/temporal_encoder/transformers_stack": "visual.temporal",
    "auxiliary_encoder/transformers_stack": "visual.joint",
    "text_encoder/unimodal_transformer": "transformer",
}
_NORMS = {
    "vision_encoder/spatial_ln": "visual.ln_post",
    "vision_encoder/temporal_ln": "visual.ln_temporal",
    "contrastive_vision_pooler/pooling_attention_layer_norm": "visual.attn_pool.layernorm",
    "text_encoder/unimodal_ln": "ln_final",
}
_OTHERS = {
    "vision_encoder/patch_projection/linear/bias": "visual.conv1.bias",
    "vision_encoder/spatial_pos_emb/emb_var": "visual.positional_embedding",
    "vision_encoder/temporal_pos_emb/emb_var": "visual.frame_positional_embedding",
    "text_encoder/token_emb/emb_var": "token_embedding.weight",
}
_POOL = "contrastive_vision_pooler/pooling_attention"
Take = Callable[[str], np.ndarray]  # removes an array from those of a file, and returns it
Tensors = dict[str, np.ndarray]


def read_videoprism(path: Path) -> tuple[Tensors, Settings]:
    """Returns the weights of a file by official name, see `mapping`, and what they do not tell.

    Raises InputError if the file is no VideoPrism-LvT.
    """
    try:
        if not zipfile.is_zipfile(path):  # NumPy's error would advise to load it unsafely
            raise ValueError("it is no zip archive")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name.removeprefix("params/"): file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a complete .npz file: {first_line(error)}") from None
    if not any(name.startswith("text_encoder/") for name in arrays):
        names = ", ".join(list(arrays)[:3]) or "nothing"
        problem = f"{path}: not {_SOURCE}, whose weights are below text_encoder/"
        raise InputError(f"{problem}: found {names:.300}; a video encoder alone is not supported")
    try:
        tensors, heads = _rename(arrays.pop)
    except KeyError as error:
        raise InputError(f"{path}: not {_SOURCE}: {error} is missing") from None
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: not {_SOURCE}: {first_line(error)}") from None
    tensors["logit_scale"] = np.array(-math.log(_TEMPERATURE), np.float32)
    fields = VIDEOPRISM | {f"{tower}.heads": number for tower, number in heads.items()}
    preprocess = PreprocessConfig(**VIDEOPRISM_PREPROCESS)
    settings = Settings(fields, preprocess=preprocess, source=_SOURCE)
    named = {f"clip.{name}": array for name, array in tensors.items()}
    return named | arrays, settings  # the other arrays are reported as unknown


def _rename(take: Take) -> tuple[Tensors, dict[str, int]]:
    """Returns the weights by name and in PyTorch's layout, and the heads of the towers."""
    tensors, heads = {}, {}
    for source, target in _STACKS.items():
        layers, count = _rename_blocks(take, f"{source}/x_layers/")
        heads["text" if source.startswith("text") else "vision"] = count
        for name, array in layers.items():
            tensors |= {f"{target}.resblocks.{i}.{name}": x for i, x in enumerate(array)}
    for source, target in _NORMS.items():
        tensors |= _rename_norm(take, source, target)
    tensors |= {target: take(source) for source, target in _OTHERS.items()}
    patches = take("vision_encoder/patch_projection/linear/kernel")  # rows, columns, RGB
    if len(patches) != 3 * (side := math.isqrt(len(patches) // 3)) ** 2:
        raise ValueError(f"patch_projection has {len(patches)} rows, must be 3 times a square")
    tensors["visual.conv1.weight"] = patches.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
    tensors["class_embedding"] = take("text_encoder/cls_emb").reshape(-1)
    return tensors | _rename_pool(take), heads


def _rename_norm(take: Take, source: str, target: str) -> Tensors:
    """Returns a layer norm, whose scale is stored less 1."""
    scale, bias = take(f"{source}/scale") + np.float32(1), take(f"{source}/bias")
    return {f"{target}.weight": scale, f"{target}.bias": bias}


def _rename_blocks(take: Take, prefix: str) -> tuple[Tensors, int]:
    """Returns the blocks of a Transformer, stacked along axis 0, and its number of heads."""
    attention = f"{prefix}self_attention/"
    # Layer x 3 x input x head x output, and layer x output x head x input.
    weights, biases = (
        np.stack([take(f"{attention}{name}/{kind}") for name in ("query", "key", "value")], 1)
        for kind in "wb"
    )
    (layers, _, width, heads, _), post = weights.shape, take(f"{attention}post/w")
    block: dict[str, Any] = {
        "attn.in_proj_weight": np.moveaxis(weights, 2, -1).reshape(layers, -1, width),
        "attn.in_proj_bias": biases.reshape(layers, -1),
        "attn.out_proj.weight": post.reshape(layers, width, -1),
        "attn.out_proj.bias": take(f"{attention}post/b"),
    }
    for source, target in (("ffn_layer1", "mlp.c_fc"), ("ffn_layer2", "mlp.c_proj")):
        linear = f"{prefix}ff_layer/{source}/linear/"
        block[f"{target}.weight"] = take(f"{linear}kernel").swapaxes(1, 2)
        block[f"{target}.bias"] = take(f"{linear}bias")
    block |= _rename_norm(take, f"{prefix}layer_norm", "ln_1")
    return block | _rename_norm(take, f"{prefix}ff_layer/layer_norm", "ln_2"), heads


def _rename_pool(take: Take) -> Tensors:
    """Returns the pool, without its norm."""
    width = (probe := take("contrastive_vision_pooler/pooling_attention_query")).shape[-1]
    names = ("query", "key", "value")
    weights = {name: take(f"{_POOL}/{name}/w").reshape(width, -1).T for name in names}
    biases = {name: take(f"{_POOL}/{name}/b").reshape(-1) for name in names}
    return {
        "visual.attn_pool.probe": probe[None],
        "visual.attn_pool.scale": take(f"{_POOL}/per_dim_scale/per_dim_scale"),
        "visual.attn_pool.query.weight": weights["query"],
        "visual.attn_pool.query.bias": biases["query"],
        "visual.attn_pool.key_value.weight": np.concatenate([weights["key"], weights["value"]]),
        "visual.attn_pool.key_value.bias": np.concatenate([biases["key"], biases["value"]]),
        "visual.attn_pool.attn.out_proj.weight": take(f"{_POOL}/post/w").reshape(width, -1),
        "visual.attn_pool.attn.out_proj.bias": take(f"{_POOL}/post/b"),
    }
