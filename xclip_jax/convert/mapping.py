"""Maps parameters to PyTorch names and layouts and back, bit for bit.

The official names are those of the X-CLIP and CLIP4Clip checkpoints; plain CLIP has the same names
without `clip.`. Hugging Face's names are those of `CLIPModel`. In a name, {} stands for the layer:
parameters are stacked over layers along a leading axis. Kernels are input x output.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax.cli import InputError, list_some

Tensors = Mapping[str, np.ndarray]
Names = dict[str, str]


def _expand(names: Names, stacks: Names, block: Names, leaves: Names) -> Names:
    """Returns {name: official name} of all tensors: each part of each block, each leaf of both."""
    modules = {a + x: b + y for a, b in stacks.items() for x, y in block.items()} | names
    return {a + x: b + y for a, b in modules.items() for x, y in ({"": ""} | leaves).items()}


_STACKS = {
    "clip/visual/encoder/blocks/": "clip.visual.transformer.resblocks.{}.",
    "clip/textual/encoder/blocks/": "clip.transformer.resblocks.{}.",
    "temporal_encoder/encoder/blocks/": "transformerClip.resblocks.{}.",
    "pair_encoder/encoder/blocks/": "cross.transformer.resblocks.{}.",
}
_BLOCK = {
    "attention/qkv/kernel": "attn.in_proj_weight",
    "attention/qkv/bias": "attn.in_proj_bias",
    "attention/out": "attn.out_proj",
    "fc": "mlp.c_fc",
    "proj": "mlp.c_proj",
    "ln_1": "ln_1",
    "ln_2": "ln_2",
}
_PARAMETERS = {
    "clip/logit_scale": "clip.logit_scale",
    "clip/visual/patch": "clip.visual.conv1",
    "clip/visual/class_token": "clip.visual.class_embedding",
    "clip/visual/positions": "clip.visual.positional_embedding",
    "clip/visual/ln_pre": "clip.visual.ln_pre",
    "clip/visual/ln_post": "clip.visual.ln_post",
    "clip/visual/projection/kernel": "clip.visual.proj",
    "clip/textual/tokens/embedding": "clip.token_embedding.weight",
    "clip/textual/positions": "clip.positional_embedding",
    "clip/textual/ln_final": "clip.ln_final",
    "clip/textual/projection/kernel": "clip.text_projection",
    "temporal_encoder/positions": "frame_position_embeddings.weight",
    "temporal_encoder/input/kernel": "lstm_visual.weight_ih_l0",
    "temporal_encoder/input/bias": "lstm_visual.bias_ih_l0",
    "temporal_encoder/hidden_kernel": "lstm_visual.weight_hh_l0",
    "temporal_encoder/hidden_bias": "lstm_visual.bias_hh_l0",
    "pair_encoder/positions": "cross.embeddings.position_embeddings.weight",
    "pair_encoder/ln_pool": "cross.pooler.ln_pool",
    "pair_encoder/pool": "cross.pooler.dense",
    "pair_encoder/score": "similarity_dense",
    "aggregation_matrices/video_sentence": "global_mat_weight",
    "aggregation_matrices/video_word": "word_logit_weight",
    "aggregation_matrices/frame_sentence": "frame_logit_weight",
    "aggregation_matrices/frame_word": "local_mat_weight",
    "aggregation_matrices/frame_word_words": "word_mat_weight",
    "aggregation_matrices/frame_word_frames": "frame_mat_weight",
    "aggregation_matrices/frame_word_words_2": "word_mat_weight2",
    "aggregation_matrices/frame_word_frames_2": "frame_mat_weight2",
}
_LEAVES = {"/kernel": ".weight", "/bias": ".bias", "/norm/scale": ".weight", "/norm/bias": ".bias"}
OFFICIAL = _expand(_PARAMETERS, _STACKS, _BLOCK, _LEAVES)
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
    "vision_model.embeddings.patch_embedding": "clip.visual.conv1",
    "vision_model.embeddings.class_embedding": "clip.visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "clip.visual.positional_embedding",
    "vision_model.pre_layrnorm": "clip.visual.ln_pre",  # sic
    "vision_model.post_layernorm": "clip.visual.ln_post",
    "visual_projection.weight": "clip.visual.proj",
    "text_model.embeddings.token_embedding": "clip.token_embedding",
    "text_model.embeddings.position_embedding.weight": "clip.positional_embedding",
    "text_model.final_layer_norm": "clip.ln_final",
    "text_projection.weight": "clip.text_projection",
}
_HF_LEAVES = {".weight": ".weight", ".bias": ".bias"}
HUGGING_FACE = _expand(_HF_TENSORS, _HF_STACKS, _HF_BLOCK, _HF_LEAVES)
# Saved by the release for every model, and never used by the models that lack them here.
UNREAD = ("frame_position_embeddings.weight", "clip.logit_scale", "global_mat_weight")
UNREAD += ("local_mat_weight", "word_logit_weight", "word_mat_weight", "word_mat_weight2")
UNREAD += ("frame_logit_weight", "frame_mat_weight", "frame_mat_weight2")
# Not weights: sizes stored in OpenAI's archives, and buffers saved by older libraries.
BUFFERS = re.compile(
    r"(.*\.)?(position_ids|attn_mask|input_resolution|context_length|vocab_size|num_batches_tracked)"
)
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def to_params(tensors: Tensors, template: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the parameters of a checkpoint.

    Args:
        tensors: official name -> array.
        template: the parameters' pytree of ShapeDtypeStructs.

    Returns:
        (params, unused): float32 arrays in the structure of `template`; tensors not used in it.

    Raises InputError if tensors are missing, have another shape or type, or contain NaN.
    """
    # Nothing is allocated for parameters that are missing.
    empty = torch_views(jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), template))
    problems = [f"{name} is missing" for name in empty.keys() - tensors.keys()]
    for name in empty.keys() & tensors.keys():
        tensor, expected = tensors[name], empty[name].shape
        if tensor.shape != expected:
            problems.append(f"{name} has shape {tensor.shape}, must be {expected}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} has type {tensor.dtype}, must be of floating point")
        elif not np.isfinite(_to_float32(tensor)).all():
            problems.append(f"{name} contains NaN or infinite numbers")
    if problems:
        raise InputError(f"the weights do not fit the model: {list_some(sorted(problems))}")
    params = jax.tree.map(lambda x: np.empty(x.shape, np.float32), template)
    for name, view in torch_views(params).items():
        view[...] = _to_float32(tensors[name])
    return params, {name: array for name, array in tensors.items() if name not in empty}


def _to_float32(tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # becomes infinite
        return tensor.astype(np.float32)


def to_tensors(params: Any) -> dict[str, np.ndarray]:
    """Returns copies of `torch_views`: the inverse of `to_params`."""
    views = torch_views(jax.tree.map(np.asarray, params))
    return {name: np.array(view, order="C") for name, view in views.items()}


def torch_views(params: Any) -> dict[str, np.ndarray]:
    """Returns views of NumPy parameters in PyTorch's layout, by official name.

    Raises InputError if the official code has no such parameters.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    if unknown := [name for name in named if name not in OFFICIAL]:
        raise InputError(f"the official code has no counterpart of {', '.join(unknown)}")
    views = {}
    for name, array in named.items():
        for index, layer in enumerate(array if "{}" in OFFICIAL[name] else [array]):
            views[OFFICIAL[name].format(index)] = _torch_layout(name, layer)
    return views


def _torch_layout(name: str, array: np.ndarray) -> np.ndarray:
    if name.endswith("patch/kernel"):
        return array.transpose(3, 2, 0, 1)
    if name.endswith("projection/kernel"):  # CLIP multiplies by it from the right too
        return array
    if name.endswith("out/kernel"):
        return array.reshape(-1, array.shape[-1]).T
    if name.endswith("kernel"):
        return array.reshape(array.shape[0], -1).T
    return array.reshape(-1) if name.endswith("qkv/bias") else array


def from_hugging_face(tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns a `CLIPModel` state dict under official names, unknown names unchanged."""
    merged = dict(tensors)
    for query in [name for name in tensors if ".q_proj." in name]:
        parts = [query.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if tensors.keys() >= set(parts):  # else they are reported under these names
            three = [merged.pop(part) for part in parts]
            merged[query.replace(".q_proj.", ".qkv_proj.")] = np.concatenate(three)
    return {_translate(name, HUGGING_FACE): _transpose(name, x) for name, x in merged.items()}


def to_hugging_face(tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns CLIP's towers under official names as a `CLIPModel` state dict."""
    names, renamed = {official: name for name, official in HUGGING_FACE.items()}, {}
    for official, array in tensors.items():
        name = _translate(official, names)
        if ".qkv_proj." in name:
            for letter, third in zip("qkv", np.split(array, 3), strict=True):
                renamed[name.replace(".qkv_proj.", f".{letter}_proj.")] = third
        else:
            renamed[name] = np.array(_transpose(name, array), order="C")
    return renamed


def _translate(name: str, names: Names) -> str:
    """Returns the counterpart of a tensor's name, or the name itself if it has none."""
    layer = _LAYER.search(name)
    return names.get(_LAYER.sub("{}", name, 1), name).replace("{}", layer[0] if layer else "")


def _transpose(name: str, array: np.ndarray) -> np.ndarray:
    """Converts between CLIP's projections, input x output, and Hugging Face's."""
    return array.T if name.endswith("projection.weight") else array
