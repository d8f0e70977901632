"""Maps parameters to PyTorch names and layouts and back, bit for bit.

The official names are those of the X-CLIP and CLIP4Clip checkpoints; plain CLIP has the
same names without `clip.`. Parameters are stacked over layers along a leading axis; kernels are
input x output. Hugging Face's names are those of `CLIPModel`.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from xclip_jax.cli import InputError

BLOCKS = {
    "clip/visual/encoder/blocks": "clip.visual.transformer.resblocks",
    "clip/textual/encoder/blocks": "clip.transformer.resblocks",
    "temporal_encoder/encoder/blocks": "transformerClip.resblocks",
    "pair_encoder/encoder/blocks": "cross.transformer.resblocks",
}
NORM = {"norm/scale": "weight", "norm/bias": "bias"}
LINEAR = {"kernel": "weight", "bias": "bias"}
_MODULES = {
    "attention/out": ("attn.out_proj", LINEAR),
    "fc": ("mlp.c_fc", LINEAR),
    "proj": ("mlp.c_proj", LINEAR),
    "ln_1": ("ln_1", NORM),
    "ln_2": ("ln_2", NORM),
    "clip/visual/ln_pre": ("clip.visual.ln_pre", NORM),
    "clip/visual/ln_post": ("clip.visual.ln_post", NORM),
    "clip/textual/ln_final": ("clip.ln_final", NORM),
    "pair_encoder/ln_pool": ("cross.pooler.ln_pool", NORM),
    "pair_encoder/pool": ("cross.pooler.dense", LINEAR),
    "pair_encoder/score": ("similarity_dense", LINEAR),
}
LEAVES = {
    "attention/qkv/kernel": "attn.in_proj_weight",
    "attention/qkv/bias": "attn.in_proj_bias",
    "clip/logit_scale": "clip.logit_scale",
    "clip/visual/patch/kernel": "clip.visual.conv1.weight",
    "clip/visual/class_token": "clip.visual.class_embedding",
    "clip/visual/positions": "clip.visual.positional_embedding",
    "clip/visual/projection/kernel": "clip.visual.proj",
    "clip/textual/tokens/embedding": "clip.token_embedding.weight",
    "clip/textual/positions": "clip.positional_embedding",
    "clip/textual/projection/kernel": "clip.text_projection",
    "temporal_encoder/positions": "frame_position_embeddings.weight",
    "temporal_encoder/input/kernel": "lstm_visual.weight_ih_l0",
    "temporal_encoder/input/bias": "lstm_visual.bias_ih_l0",
    "temporal_encoder/hidden_kernel": "lstm_visual.weight_hh_l0",
    "temporal_encoder/hidden_bias": "lstm_visual.bias_hh_l0",
    "pair_encoder/positions": "cross.embeddings.position_embeddings.weight",
    "aggregation_matrices/video_sentence": "global_mat_weight",
    "aggregation_matrices/video_word": "word_logit_weight",
    "aggregation_matrices/frame_sentence": "frame_logit_weight",
    "aggregation_matrices/frame_word": "local_mat_weight",
    "aggregation_matrices/frame_word_words": "word_mat_weight",
    "aggregation_matrices/frame_word_frames": "frame_mat_weight",
    "aggregation_matrices/frame_word_words_2": "word_mat_weight2",
    "aggregation_matrices/frame_word_frames_2": "frame_mat_weight2",
    **{
        f"{module}/{leaf}": f"{official}.{name}"
        for module, (official, leaves) in _MODULES.items()
        for leaf, name in leaves.items()
    },
}
# Saved by the release for every model, and never used by the models that lack them here.
UNREAD = ("frame_position_embeddings.weight", "clip.logit_scale")
# Not weights: sizes stored in OpenAI's archives, and buffers saved by older libraries.
BUFFERS = re.compile(
    r"(.*\.)?(position_ids|attn_mask|input_resolution|context_length|vocab_size|num_batches_tracked)"
)
_HF_LEAVES = {
    "logit_scale": "clip.logit_scale",
    "text_model.embeddings.token_embedding.weight": "clip.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "clip.positional_embedding",
    "text_model.final_layer_norm.weight": "clip.ln_final.weight",
    "text_model.final_layer_norm.bias": "clip.ln_final.bias",
    "text_projection.weight": "clip.text_projection",
    "vision_model.embeddings.class_embedding": "clip.visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "clip.visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "clip.visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "clip.visual.ln_pre.weight",  # sic
    "vision_model.pre_layrnorm.bias": "clip.visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "clip.visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "clip.visual.ln_post.bias",
    "visual_projection.weight": "clip.visual.proj",
}
_HF_BLOCKS = {"text_model": "clip.transformer", "vision_model": "clip.visual.transformer"}
_HF_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_HF_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_BLOCK = re.compile(r"(clip(?:\.visual)?\.transformer)\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_HF_QKV = tuple(f"self_attn.{letter}_proj" for letter in "qkv")


Tensors = Mapping[str, np.ndarray]
Path = tuple[jax.tree_util.DictKey, ...]


def to_params(tensors: Tensors, template: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the parameters of a checkpoint.

    Args:
        tensors: official name -> array.
        template: the parameters' pytree of ShapeDtypeStructs.

    Returns:
        (params, unused): float32 arrays in the structure of `template`; tensors not used in it.

    Raises:
        InputError: tensors are missing or have another shape; the message lists all of them.
    """
    unused, problems = dict(tensors), []

    def take(path: Path, leaf: jax.ShapeDtypeStruct) -> np.ndarray | None:
        pattern, is_stacked = torch_name(path)
        shape = leaf.shape[1:] if is_stacked else leaf.shape
        expected, layers = torch_shape(path, shape), []
        for index in range(leaf.shape[0] if is_stacked else 1):
            name = pattern.format(index)
            array = unused.pop(name, None)
            if array is None:
                problems.append(f"{name} is missing")
            elif array.shape != expected:
                problems.append(f"{name} has shape {array.shape}, must be {expected}")
            else:
                layers.append(_from_torch(path, array.astype(np.float32), shape))
        if problems:
            return None
        return np.stack(layers) if is_stacked else layers[0]

    params = jax.tree_util.tree_map_with_path(take, template)
    if problems:
        raise InputError(f"the weights do not fit the model: {'; '.join(sorted(set(problems)))}")
    return params, unused


def to_tensors(params: Any) -> dict[str, np.ndarray]:
    """Returns parameters as official name -> float32 array (the inverse of `to_params`).

    Raises:
        InputError: the official code has no such parameters.
    """
    tensors, unknown = {}, []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        try:
            name, is_stacked = torch_name(path)
        except KeyError as error:
            unknown.append(error.args[0])
            continue
        layers = np.asarray(leaf) if is_stacked else [np.asarray(leaf)]
        for index, layer in enumerate(layers):
            tensors[name.format(index)] = np.array(_to_torch(path, layer), order="C")
    if unknown:
        raise InputError(f"the official code has no counterpart of {', '.join(unknown)}")
    return tensors


def torch_name(path: Path) -> tuple[str, bool]:
    """Returns (official name with {} for the layer, True if stacked over layers).

    Raises:
        KeyError: the parameter has no official name.
    """
    name = _join(path)
    for blocks, official in BLOCKS.items():
        if name.startswith(blocks + "/"):
            return f"{official}.{{}}.{LEAVES[name[len(blocks) + 1 :]]}", True
    return LEAVES[name], False


def torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the PyTorch shape of a parameter, without the layer axis if it is stacked."""
    return _to_torch(path, np.empty(shape, np.bool_)).shape


def _join(path: Path) -> str:
    return "/".join(entry.key for entry in path)


def _from_torch(path: Path, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    name = _join(path)
    if name.endswith("patch/kernel"):
        return array.transpose(2, 3, 1, 0)
    if name.endswith("kernel") and not name.endswith("projection/kernel"):
        return array.T.reshape(shape)
    return array.reshape(shape)


def _to_torch(path: Path, array: np.ndarray) -> np.ndarray:
    name = _join(path)
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
    official, qkv = {}, {}
    for name, array in tensors.items():
        layer = _HF_LAYER.fullmatch(name)
        if name in _HF_LEAVES:
            is_transposed = name.endswith("projection.weight") and array.ndim == 2
            official[_HF_LEAVES[name]] = array.T if is_transposed else array
        elif layer and layer[3] in _HF_QKV:
            merged = f"{_HF_BLOCKS[layer[1]]}.resblocks.{layer[2]}.attn.in_proj_{layer[4]}"
            qkv.setdefault(merged, {})[layer[3]] = name
        elif layer and layer[3] in _HF_PARTS:
            block = f"{_HF_BLOCKS[layer[1]]}.resblocks.{layer[2]}"
            official[f"{block}.{_HF_PARTS[layer[3]]}.{layer[4]}"] = array
        else:
            official[name] = array
    for merged, parts in qkv.items():
        if set(parts) == set(_HF_QKV):
            official[merged] = np.concatenate([tensors[parts[part]] for part in _HF_QKV])
        else:  # incomplete: to be reported under these names
            official |= {name: tensors[name] for name in parts.values()}
    return official


def to_hugging_face(tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns the CLIP towers of an official state dict as a `CLIPModel` state dict."""
    leaves = {official: name for name, official in _HF_LEAVES.items()}
    towers = {official: name for name, official in _HF_BLOCKS.items()}
    parts = {official: name for name, official in _HF_PARTS.items()}
    renamed = {}
    for name, array in tensors.items():
        block = _BLOCK.fullmatch(name)
        if name in leaves:
            is_transposed = leaves[name].endswith("projection.weight")
            renamed[leaves[name]] = array.T if is_transposed else array
        elif block:
            prefix = f"{towers[block[1]]}.encoder.layers.{block[2]}"
            if block[3] == "attn.in_proj":
                for part, third in zip(_HF_QKV, np.split(array, 3), strict=True):
                    renamed[f"{prefix}.{part}.{block[4]}"] = third
            else:
                renamed[f"{prefix}.{parts[block[3]]}.{block[4]}"] = array
    return {name: np.array(array, order="C") for name, array in renamed.items()}
