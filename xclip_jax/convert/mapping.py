"""PyTorch names and layouts <-> ours, both ways, bit for bit.

The names are those of the official X-CLIP and CLIP4Clip checkpoints; plain CLIP's are the same
without `clip.`. Our layers are stacked along a leading axis, kernels are input x output.
"""

import re

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
        f"{ours}/{leaf}": f"{theirs}.{name}"
        for ours, (theirs, leaves) in _MODULES.items()
        for leaf, name in leaves.items()
    },
}
# What the release saves but never reads, by the models that do not have it themselves.
UNREAD = ("frame_position_embeddings.weight", "clip.logit_scale")
# Not weights: sizes that OpenAI's archives carry, and what older libraries saved along.
BUFFERS = re.compile(
    r"(.*\.)?(position_ids|attn_mask|input_resolution|context_length|vocab_size|num_batches_tracked)"
)


def to_params(tensors, template):
    """Checkpoint -> parameters.

    Args:
        tensors: official name -> array.
        template: the parameters' pytree of ShapeDtypeStructs.

    Returns:
        (params, left): float32 arrays in the template's tree; the tensors that it has no use for.

    Raises:
        InputError: a tensor is missing or has another shape; all such are listed.
    """
    left, problems = dict(tensors), []

    def take(path, leaf):
        name, stacked = torch_name(path)
        shape = leaf.shape[1:] if stacked else leaf.shape
        parts = []
        for index in range(leaf.shape[0] if stacked else 1):
            one = name.format(index)
            found = left.pop(one, None)
            wanted = torch_shape(path, shape)
            if found is None:
                problems.append(f"{one} is missing")
            elif found.shape != wanted:
                problems.append(f"{one} has shape {found.shape}, must be {wanted}")
            else:
                parts.append(_to_ours(path, found.astype(np.float32), shape))
        if problems:
            return None
        return np.stack(parts) if stacked else parts[0]

    params = jax.tree_util.tree_map_with_path(take, template)
    if problems:
        raise InputError(f"the weights do not fit the model: {'; '.join(sorted(set(problems)))}")
    return params, left


def to_tensors(params):
    """Parameters -> official name -> float32 array: the inverse of `to_params`.

    Raises:
        InputError: the official code has no such parameters.
    """
    tensors, foreign = {}, []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.asarray(leaf)
        try:
            name, stacked = torch_name(path)
        except KeyError as error:
            foreign.append(error.args[0])
            continue
        for index, one in enumerate(leaf if stacked else [leaf]):
            tensors[name.format(index)] = np.array(_to_theirs(path, one), order="C")
    if foreign:
        raise InputError(f"the official code has no counterpart of {', '.join(foreign)}")
    return tensors


def torch_name(path):
    """(official name, whether it is a layer's, with {} for the number) of a parameter's path.

    Raises:
        KeyError: there is none.
    """
    ours = _join(path)
    for blocks, theirs in BLOCKS.items():
        if ours.startswith(blocks + "/"):
            return f"{theirs}.{{}}.{LEAVES[ours[len(blocks) + 1 :]]}", True
    return LEAVES[ours], False


def torch_shape(path, shape):
    """The PyTorch shape of a parameter (one layer's) of ours."""
    return _to_theirs(path, np.empty(shape, np.bool_)).shape


def _join(path):
    return "/".join(entry.key for entry in path)


def _to_ours(path, array, shape):
    ours = _join(path)
    if ours.endswith("patch/kernel"):
        return array.transpose(2, 3, 1, 0)
    if ours.endswith("kernel") and not ours.endswith("projection/kernel"):
        return array.T.reshape(shape)
    return array.reshape(shape)


def _to_theirs(path, array):
    ours = _join(path)
    if ours.endswith("patch/kernel"):
        return array.transpose(3, 2, 0, 1)
    if ours.endswith("projection/kernel"):  # CLIP multiplies by it from the right, as we do
        return array
    if ours.endswith("out/kernel"):
        return array.reshape(-1, array.shape[-1]).T
    if ours.endswith("kernel"):
        return array.reshape(array.shape[0], -1).T
    return array.reshape(-1) if ours.endswith("qkv/bias") else array
