"""Renames the tensors of published layouts to the official names of `mapping`.

- Hugging Face: `CLIPModel`, `SiglipModel` and their halves;
- timm's image towers below `visual.trunk.`, as open_clip saves them;
- PE-Core, whose names are OpenAI's, with an attention pool;
- Long-CLIP, whose positions are in two tables.
"""

import re

import numpy as np

from xclip_jax.cli import InputError
from xclip_jax.convert.mapping import Tensors, expand, translate

_HF_STACKS = {
    "vision_model.encoder.layers.{}.": "clip.visual.transformer.resblocks.{}.",
    "text_model.encoder.layers.{}.": "clip.transformer.resblocks.{}.",
}
_HF_BLOCK = {
    "self_attn.qkv_proj.weight": "attn.in_proj_weight",  # three tensors, q_proj to v_proj
    "self_attn.qkv_proj.bias": "attn.in_proj_bias",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}
_HF_TENSORS = {
    "logit_scale": "clip.logit_scale",
    "logit_bias": "logit_bias",
    "vision_model.embeddings.patch_embedding": "clip.visual.conv1",
    "vision_model.embeddings.class_embedding": "clip.visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "clip.visual.positional_embedding",
    "vision_model.pre_layrnorm": "clip.visual.ln_pre",  # sic
    "vision_model.post_layernorm": "clip.visual.ln_post",
    "vision_model.head.probe": "clip.visual.attn_pool.probe",
    "vision_model.head.attention.in_proj_weight": "clip.visual.attn_pool.attn.in_proj_weight",
    "vision_model.head.attention.in_proj_bias": "clip.visual.attn_pool.attn.in_proj_bias",
    "vision_model.head.attention.out_proj": "clip.visual.attn_pool.attn.out_proj",
    "vision_model.head.layernorm": "clip.visual.attn_pool.layernorm",
    "vision_model.head.mlp.fc1": "clip.visual.attn_pool.mlp.c_fc",
    "vision_model.head.mlp.fc2": "clip.visual.attn_pool.mlp.c_proj",
    "visual_projection.weight": "clip.visual.proj",
    "text_model.embeddings.token_embedding": "clip.token_embedding",
    "text_model.embeddings.position_embedding.weight": "clip.positional_embedding",
    "text_model.final_layer_norm": "clip.ln_final",
    "text_projection.weight": "clip.text_projection",
}
_SIGLIP_TENSORS = {
    "text_model.head.weight": "clip.text_projection",
    "text_model.head.bias": "clip.text_projection_bias",
}
_LEAVES = {".weight": ".weight", ".bias": ".bias"}
HUGGING_FACE = expand(_HF_TENSORS, _HF_STACKS, _HF_BLOCK, _LEAVES)
_TRUNK = "visual.trunk."
_TIMM_BLOCK = {
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj": "attn.out_proj",
    "attn.norm": "attn.ln",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc1_x": "mlp.c_fc",
    "mlp.fc1_g": "mlp.gate",
    "mlp.norm": "mlp.ln",
    "mlp.fc2": "mlp.c_proj",
    "norm1": "ln_1",
    "norm2": "ln_2",
}
_TIMM_TENSORS = {
    "patch_embed.proj": "visual.conv1",
    "cls_token": "visual.class_embedding",
    "pos_embed": "visual.positional_embedding",
    "norm_pre": "visual.ln_pre",
    "norm": "visual.ln_post",
    "head.weight": "visual.proj",
    "head.bias": "visual.proj_bias",
    "attn_pool.latent": "visual.attn_pool.probe",
    "attn_pool.q": "visual.attn_pool.query",
    "attn_pool.kv": "visual.attn_pool.key_value",
    "attn_pool.proj": "visual.attn_pool.attn.out_proj",
    "attn_pool.norm": "visual.attn_pool.layernorm",
    "attn_pool.mlp.fc1": "visual.attn_pool.mlp.c_fc",
    "attn_pool.mlp.fc2": "visual.attn_pool.mlp.c_proj",
}
TIMM = expand(
    _TIMM_TENSORS, {"blocks.{}.": "visual.transformer.resblocks.{}."}, _TIMM_BLOCK, _LEAVES
)
_POOL = "visual.attn_pool."
_LONG_CLIP_KEPT = 20  # first rows of the original positions


def from_hugging_face(tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns a Hugging Face state dict under official names, unknown names unchanged."""
    merged = dict(tensors)
    for query in [name for name in tensors if ".q_proj." in name]:
        parts = [query.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if tensors.keys() >= set(parts):  # else they are reported under these names
            three = [merged.pop(part) for part in parts]
            merged[query.replace(".q_proj.", ".qkv_proj.")] = np.concatenate(three)
    names = HUGGING_FACE | _SIGLIP_TENSORS
    renamed = {translate(name, names): _transpose(name, x) for name, x in merged.items()}
    for name in {"logit_bias", "clip.logit_scale"} & renamed.keys():
        renamed[name] = _scalar(renamed[name])
    return split_pool(renamed)


def to_hugging_face(tensors: Tensors, *, siglip: bool = False) -> dict[str, np.ndarray]:
    """Returns the encoders under official names as a `CLIPModel` or `SiglipModel` state dict."""
    known = HUGGING_FACE | (_SIGLIP_TENSORS if siglip else {})
    names, renamed = {official: name for name, official in known.items()}, {}
    if siglip:
        scalars = {"clip.logit_scale", "logit_bias"}  # of shape (1,) in SiglipModel
        tensors = {n: x.reshape(1) if n in scalars else x for n, x in tensors.items()}
    for official, array in join_pool(tensors).items():
        name = translate(official, names)
        if ".qkv_proj." in name:
            for letter, third in zip("qkv", np.split(array, 3), strict=True):
                renamed[name.replace(".qkv_proj.", f".{letter}_proj.")] = third
        else:
            renamed[name] = np.array(_transpose(name, array), order="C")
    return renamed


def _transpose(name: str, array: np.ndarray) -> np.ndarray:
    """Converts between CLIP's projections, input x output, and Hugging Face's."""
    is_projection = name.endswith(("projection.weight", "text_model.head.weight"))
    return array.T if is_projection else array


def _scalar(array: np.ndarray) -> np.ndarray:
    return array.reshape(()) if array.size == 1 else array


def from_timm(tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns open_clip's tensors with those of timm's image tower under CLIP's names.

    EVA-02's keys have no bias, of which zeros are the equivalent.
    """
    renamed = {name: x for name, x in tensors.items() if not name.startswith(_TRUNK)}
    trunk = {n.removeprefix(_TRUNK): x for n, x in tensors.items() if n.startswith(_TRUNK)}
    for query in [name for name in trunk if ".q_proj.weight" in name]:
        stem = query.removesuffix("q_proj.weight")
        parts = [f"{stem}{letter}_proj.weight" for letter in "qkv"]
        biases = [f"{stem}{letter}_proj.bias" for letter in "qv"]
        if trunk.keys() >= {*parts, *biases} and f"{stem}k_proj.bias" not in trunk:
            trunk[f"{stem}qkv.weight"] = np.concatenate([trunk.pop(part) for part in parts])
            first, last = (trunk.pop(name) for name in biases)
            trunk[f"{stem}qkv.bias"] = np.concatenate([first, np.zeros_like(first), last])
    for name, array in trunk.items():
        official = translate(name, TIMM)
        if name in ("pos_embed", "cls_token"):
            array = array.reshape(-1, array.shape[-1]) if name == "pos_embed" else array.reshape(-1)
        elif name == "head.weight":
            array = array.T
        renamed[official if official != name else _TRUNK + name] = array
    if renamed.get("text_projection.weight", np.zeros(0)).ndim == 2:
        renamed["text_projection"] = renamed.pop("text_projection.weight").T
    if "text_projection.bias" in renamed:
        renamed["text_projection_bias"] = renamed.pop("text_projection.bias")
    return renamed


def split_pool(tensors: Tensors) -> dict[str, np.ndarray]:
    """Splits the attention pool's q, k, v, stacked as in PyTorch, into query and key_value."""
    split = {}
    for name, array in tensors.items():
        match = re.fullmatch(r"(.*visual\.attn_pool\.)attn\.in_proj_(weight|bias)", name)
        if match and len(array) % 3 == 0:
            width = len(array) // 3
            split[f"{match[1]}query.{match[2]}"] = array[:width]
            split[f"{match[1]}key_value.{match[2]}"] = array[width:]
        else:
            split[name] = array
    return split


def join_pool(tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns tensors with query and key_value joined: the inverse of `split_pool`."""
    joined = dict(tensors)
    for kind in ("weight", "bias"):
        names = [f"clip.{_POOL}{part}.{kind}" for part in ("query", "key_value")]
        if joined.keys() >= set(names):
            parts = [joined.pop(name) for name in names]
            joined[f"clip.{_POOL}attn.in_proj_{kind}"] = np.concatenate(parts)
    return joined


def from_long_clip(tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns Long-CLIP's tensors with its two tables of positions joined.

    Zhang et al., 2024, https://arxiv.org/abs/2403.15378, Sec. 3.2: the first 20 positions are
    CLIP's, those after them come from the second table.
    """
    first, second = tensors["positional_embedding"], tensors["positional_embedding_res"]
    if first.shape != second.shape or len(first) <= _LONG_CLIP_KEPT:
        shapes = f"{first.shape} and {second.shape}"
        raise InputError(f"positional_embedding and positional_embedding_res have shapes {shapes}")
    joined = {name: x for name, x in tensors.items() if name != "positional_embedding_res"}
    kept = first[:_LONG_CLIP_KEPT], second[_LONG_CLIP_KEPT:]
    return joined | {"positional_embedding": np.concatenate(kept)}
