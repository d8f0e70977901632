"""Hugging Face's names of CLIP (`CLIPModel`) <-> the official ones, bit for bit."""

import re

import numpy as np

_LEAVES = {
    "logit_scale": "clip.logit_scale",
    "text_model.embeddings.token_embedding.weight": "clip.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "clip.positional_embedding",
    "text_model.final_layer_norm.weight": "clip.ln_final.weight",
    "text_model.final_layer_norm.bias": "clip.ln_final.bias",
    "text_projection.weight": "clip.text_projection",
    "vision_model.embeddings.class_embedding": "clip.visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "clip.visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "clip.visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "clip.visual.ln_pre.weight",  # their spelling
    "vision_model.pre_layrnorm.bias": "clip.visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "clip.visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "clip.visual.ln_post.bias",
    "visual_projection.weight": "clip.visual.proj",
}
_BLOCKS = {"text_model": "clip.transformer", "vision_model": "clip.visual.transformer"}
_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_BLOCK = re.compile(r"(clip(?:\.visual)?\.transformer)\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_QKV = tuple(f"self_attn.{letter}_proj" for letter in "qkv")


def to_official(tensors):
    """`CLIPModel` state dict -> official names; what is none of its weights keeps its name."""
    found, qkv = {}, {}
    for name, array in tensors.items():
        layer = _LAYER.fullmatch(name)
        if name in _LEAVES:
            transposed = name.endswith("projection.weight") and array.ndim == 2
            found[_LEAVES[name]] = array.T if transposed else array
        elif layer and layer[3] in _QKV:
            merged = f"{_BLOCKS[layer[1]]}.resblocks.{layer[2]}.attn.in_proj_{layer[4]}"
            qkv.setdefault(merged, {})[layer[3]] = name
        elif layer and layer[3] in _PARTS:
            found[f"{_BLOCKS[layer[1]]}.resblocks.{layer[2]}.{_PARTS[layer[3]]}.{layer[4]}"] = array
        else:
            found[name] = array
    for merged, parts in qkv.items():
        if set(parts) == set(_QKV):
            found[merged] = np.concatenate([tensors[parts[part]] for part in _QKV])
        else:  # incomplete: reported under their own names
            found |= {name: tensors[name] for name in parts.values()}
    return found


def from_official(tensors):
    """The CLIP towers of an official state dict -> `CLIPModel` state dict."""
    leaves = {official: name for name, official in _LEAVES.items()}
    towers = {official: name for name, official in _BLOCKS.items()}
    parts = {official: name for name, official in _PARTS.items()}
    found = {}
    for name, array in tensors.items():
        block = _BLOCK.fullmatch(name)
        if name in leaves:
            transposed = leaves[name].endswith("projection.weight")
            found[leaves[name]] = array.T if transposed else array
        elif block:
            prefix = f"{towers[block[1]]}.encoder.layers.{block[2]}"
            if block[3] == "attn.in_proj":
                for part, third in zip(_QKV, np.split(array, 3), strict=True):
                    found[f"{prefix}.{part}.{block[4]}"] = third
            else:
                found[f"{prefix}.{parts[block[3]]}.{block[4]}"] = array
    return {name: np.array(array, order="C") for name, array in found.items()}


def clip_config(architecture, activation, bos, eos):
    """config.json of a `CLIPModel` with these sizes, a plain dict."""

    def tower(sizes, **more):
        return {
            "hidden_size": sizes["width"],
            "intermediate_size": 4 * sizes["width"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "hidden_act": activation,
            "projection_dim": architecture["embed_dim"],
            "layer_norm_eps": 1e-5,
            **more,
        }

    vision, text = architecture["vision"], architecture["text"]
    image = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    words = {
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": architecture["embed_dim"],
        "text_config": tower(text, **words, model_type="clip_text_model"),
        "vision_config": tower(vision, **image, model_type="clip_vision_model"),
    }
