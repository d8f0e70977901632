"""Maps parameters to PyTorch names and layouts and back, bit for bit.

The official names are those of the X-CLIP and CLIP4Clip checkpoints, with names of our own for what
these lack (docs/pytorch.md); plain CLIP has the same names without `clip.`. In a name, {} stands
for the layer: parameters are stacked over layers along a leading axis. Kernels are input x output.
Other layouts: `layouts`.
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


def expand(names: Names, stacks: Names, block: Names, leaves: Names) -> Names:
    """Returns {name: official name} of all tensors: each part of each block, each leaf of both."""
    modules = {a + x: b + y for a, b in stacks.items() for x, y in block.items()} | names
    return {a + x: b + y for a, b in modules.items() for x, y in ({"": ""} | leaves).items()}


_STACKS = {
    "clip/visual/encoder/blocks/": "clip.visual.transformer.resblocks.{}.",
    "clip/textual/encoder/blocks/": "clip.transformer.resblocks.{}.",
    "clip/visual/temporal/blocks/": "clip.visual.temporal.resblocks.{}.",
    "clip/visual/joint/blocks/": "clip.visual.joint.resblocks.{}.",
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
    # Of other families, in names of our own.
    "attention/ln": "attn.ln",
    "gate": "mlp.gate",
    "ln_inner": "mlp.ln",
}
_PARAMETERS = {
    "clip/logit_scale": "clip.logit_scale",
    "logit_bias": "logit_bias",
    "clip/visual/patch": "clip.visual.conv1",
    "clip/visual/class_token": "clip.visual.class_embedding",
    "clip/visual/positions": "clip.visual.positional_embedding",
    "clip/visual/frame_positions": "clip.visual.frame_positional_embedding",
    "clip/visual/ln_temporal": "clip.visual.ln_temporal",
    "clip/visual/ln_pre": "clip.visual.ln_pre",
    "clip/visual/ln_post": "clip.visual.ln_post",
    "clip/visual/projection/kernel": "clip.visual.proj",
    "clip/visual/projection/bias": "clip.visual.proj_bias",
    "clip/visual/pool/probe": "clip.visual.attn_pool.probe",
    "clip/visual/pool/scale": "clip.visual.attn_pool.scale",
    "clip/visual/pool/query": "clip.visual.attn_pool.query",
    "clip/visual/pool/key_value": "clip.visual.attn_pool.key_value",
    "clip/visual/pool/out": "clip.visual.attn_pool.attn.out_proj",
    "clip/visual/pool/ln": "clip.visual.attn_pool.layernorm",
    "clip/visual/pool/fc": "clip.visual.attn_pool.mlp.c_fc",
    "clip/visual/pool/proj": "clip.visual.attn_pool.mlp.c_proj",
    "clip/textual/tokens/embedding": "clip.token_embedding.weight",
    "clip/textual/class_token": "clip.class_embedding",
    "clip/textual/positions": "clip.positional_embedding",
    "clip/textual/ln_final": "clip.ln_final",
    "clip/textual/projection/kernel": "clip.text_projection",
    "clip/textual/projection/bias": "clip.text_projection_bias",
    "temporal_encoder/positions": "frame_position_embeddings.weight",
    "temporal_encoder/input/kernel": "lstm_visual.weight_ih_l0",
    "temporal_encoder/input/bias": "lstm_visual.bias_ih_l0",
    "temporal_encoder/hidden_kernel": "lstm_visual.weight_hh_l0",
    "temporal_encoder/hidden_bias": "lstm_visual.bias_hh_l0",
    "pair_encoder/positions": "cross.embeddings.position_embeddings.weight",
    "pair_encoder/ln_pool": "cross.pooler.ln_pool",
    "pair_encoder/kinds": "cross.embeddings.token_type_embeddings.weight",
    "pair_encoder/ln": "cross.pooler.ln_pool",
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
    "word_weights/hidden": "text_weight_fc.0",
    "word_weights/score": "text_weight_fc.2",
    "frame_weights/hidden": "video_weight_fc.0",
    "frame_weights/score": "video_weight_fc.2",
    "log_tau": "log_tau",
}
_LEAVES = {"/kernel": ".weight", "/bias": ".bias", "/norm/scale": ".weight", "/norm/bias": ".bias"}
OFFICIAL = expand(_PARAMETERS, _STACKS, _BLOCK, _LEAVES)
# Saved by the release for every model, and never used by the models that lack them here.
UNREAD = ("frame_position_embeddings.weight", "clip.logit_scale", "global_mat_weight")
UNREAD += ("local_mat_weight", "word_logit_weight", "word_mat_weight", "word_mat_weight2")
UNREAD += ("frame_logit_weight", "frame_mat_weight", "frame_mat_weight2")
# Not weights: sizes stored in OpenAI's archives, and buffers saved by older libraries.
BUFFERS = re.compile(
    r"(.*\.)?(position_ids|attn_mask|input_resolution|context_length|vocab_size|num_batches_tracked)"
)
_HEADS_BIAS = ("qkv/bias", "pool/query/bias", "pool/key_value/bias")
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

    Raises InputError if a parameter has no such name.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    if unknown := [name for name in named if name not in OFFICIAL]:
        raise InputError(f"no name in PyTorch is known for {', '.join(unknown)}")
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
    return array.reshape(-1) if name.endswith(_HEADS_BIAS) else array


def translate(name: str, names: Names) -> str:
    """Returns the counterpart of a tensor's name, or the name itself if it has none."""
    layer = _LAYER.search(name)
    return names.get(_LAYER.sub("{}", name, 1), name).replace("{}", layer[0] if layer else "")
