"""Infers the architecture of a checkpoint from the shapes and names of its tensors."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from xclip_jax.cli import InputError
from xclip_jax.convert.reading import FLAGS, Source
from xclip_jax.models import ModelConfig
from xclip_jax.models.config import PreprocessConfig, TemporalConfig, TextConfig, VisionConfig

MAX_FRAMES = 2**16
MAX_IMAGE_SIZE = 4096  # in pixels, far above any CLIP: limits what a corrupted file allocates
_MATRICES = {
    "max_words": ("word_logit_weight", "word_mat_weight", "word_mat_weight2"),
    "max_frames": ("frame_logit_weight", "frame_mat_weight", "frame_mat_weight2"),
}
_HEADS: dict[str, Any] = {  # by the module of a tensor; the last that occurs counts
    "": "mean_pooling",
    "lstm_visual": "seq_lstm",
    "transformerClip": "seq_transformer",
    "global_mat_weight": "xclip",
    "cross": "tight_transformer",  # X-CLIP saves its matrices with this head, too
}
_STACKS = {"vision": "clip.visual.transformer", "text": "clip.transformer"}
_CLIP_SCALE = 100 * (1 + 1e-5)  # largest scale of CLIP, with rounding


def infer(source: Source) -> ModelConfig:
    """Returns the architecture of a checkpoint.

    Learned matrices in `source` are cropped if its options say so. Raises InputError if sizes are
    missing or do not fit together.
    """
    official, tensors, options = source.official, source.tensors, source.options
    stated = {field: getattr(options, flag) for flag, field in FLAGS.items()}
    fields = {k: v for k, v in stated.items() if v is not None} | dict(source.settings.fields)
    towers, sizes = fields.get("towers", "both"), {}
    if towers != "text":
        stated_side = source.settings.sizes.get("vision.image_size")
        sizes |= _infer_vision(tensors, fields, stated_side)
    if towers != "vision":
        sizes |= _infer_text(tensors, fields)
    _compare(source, fields, sizes)
    if "activation" not in fields:
        allowed = "--activation=quick_gelu (OpenAI) or --activation=gelu (most of open_clip)"
        raise InputError(f"the weights do not state their activation: set {allowed}")
    modules = {name.partition(".")[0] for name in tensors}
    if options.head and official:
        raise InputError(f"--head={options.head}: the checkpoint has its own head: omit --head")
    if options.head == "xclip" and towers != "both":
        raise InputError(f"--head=xclip: the checkpoint has a {towers} tower only: omit --head")
    head = [name for module, name in _HEADS.items() if module in modules or not module][-1]
    temporal = "transformer" if "transformerClip" in modules else "none"
    temporal = "lstm" if "lstm_visual" in modules else temporal
    layers = max(_count(tensors, "transformerClip"), _count(tensors, "cross.transformer"))
    values = fields | sizes
    if values.get("text.pool") == "end" and values["text.end_id"] == values["text.vocab_size"] - 1:
        values["text.pool"], values["text.end_id"] = "argmax", 0  # the same position
    vision, text = (_section(values, name) for name in ("vision", "text"))
    words = TextConfig(**text)
    has_bias = "logit_bias" in tensors
    if has_bias or _scale(tensors) > _CLIP_SCALE:  # models of the sigmoid loss have no limit
        values["max_scale"] = 0.0
    return ModelConfig(
        preset="official" if official else "paper",
        head=options.head or head,
        towers=towers,
        embed_dim=sizes["embed_dim"],
        activation=values["activation"],
        max_scale=values.get("max_scale", 100.0),
        logit_bias=has_bias,
        dtype="float32",  # equal to PyTorch on every device
        preprocess=options.preprocess or PreprocessConfig(),
        **_fit_lengths(source, words, vision.get("num_frames") or 12),
        vision=VisionConfig(**vision),
        text=words,
        temporal=TemporalConfig(temporal, layers or 1, max(1, sizes["embed_dim"] // 64)),
    ).resolve()


def _compare(source: Source, fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raises InputError if the weights have other sizes than a file beside them states."""
    stated = {**{k: v for k, v in fields.items() if k in sizes}, **source.settings.sizes}
    for field, value in stated.items():
        if field in sizes and sizes[field] != value:
            origin = source.settings.source or "the options"
            problem = f"{origin} states {field} = {value!r:.99}"
            raise InputError(f"{problem}, the weights have {sizes[field]!r}")


def _scale(tensors: Mapping[str, np.ndarray]) -> float:
    """Returns the factor from cosines to logits, 0 if there is none."""
    log_scale = tensors.get("clip.logit_scale")
    if log_scale is None or log_scale.size != 1:
        return 0.0
    return float(np.exp(np.float64(log_scale.item())))


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the entries of a section by their names in it."""
    return {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{name}.")}


def _shape(tensors: Mapping[str, np.ndarray], name: str, dimensions: int) -> tuple[int, ...]:
    array = tensors.get(f"clip.{name}")
    if array is None or array.ndim != dimensions or not array.size:
        problem = "missing" if array is None else f"of shape {array.shape}"
        raise InputError(f"{name} is {problem}: cannot infer the sizes of CLIP")
    return array.shape


def _infer_vision(
    tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any], stated_side: Any
) -> dict[str, Any]:
    """Returns the fields of the image tower that its tensors tell, and embed_dim.

    `stated_side` is the size of images, if known, that patches need not cover.
    """
    prefix = "clip.visual."
    width, _, patch, _ = _shape(tensors, "visual.conv1.weight", 4)
    has_token = f"{prefix}class_embedding" in tensors
    positions = _shape(tensors, "visual.positional_embedding", 2)[0] - has_token
    side = patch * math.isqrt(max(0, positions))
    if not 0 < side <= MAX_IMAGE_SIZE:
        raise InputError(f"image size {side}: must be from 1 to {MAX_IMAGE_SIZE} px")
    pools, projects = f"{prefix}attn_pool.probe" in tensors, f"{prefix}proj" in tensors
    pool = "attention" if pools else "class_token"
    bias = "bias" if f"{prefix}proj_bias" in tensors else "linear"
    # A convolution with patches of 14 ignores 6 of 384 pixels.
    uncovered = stated_side - side if type(stated_side) is int else 0
    uncovered = uncovered if 0 < uncovered < patch else 0
    found = {
        "vision.image_size": side + uncovered,
        "vision.uncovered": uncovered,
        "vision.patch_size": patch,
        "vision.class_token": has_token,
        "vision.patch_bias": f"{prefix}conv1.bias" in tensors,
        "vision.pre_norm": f"{prefix}ln_pre.weight" in tensors,
        "vision.pool": "scaled_attention" if f"{prefix}attn_pool.scale" in tensors else pool,
        "vision.num_frames": len(tensors.get(f"{prefix}frame_positional_embedding", ())),
        "vision.temporal_layers": _count(tensors, f"{prefix}temporal"),
        "vision.joint_layers": _count(tensors, f"{prefix}joint"),
        "vision.projection": bias if projects else "none",
        "embed_dim": _shape(tensors, "visual.proj", 2)[1] if projects else width,
    }
    if not has_token and not pools:
        raise InputError("visual.class_embedding is missing: cannot infer the sizes of CLIP")
    if not projects and not pools:
        raise InputError("visual.proj is missing: cannot infer the sizes of CLIP")
    blocks = _infer_blocks("vision", tensors, width, fields)
    hidden = tensors.get(f"{prefix}attn_pool.mlp.c_fc.weight")
    pool_width = 0 if hidden is None else len(hidden)
    mlp_width = blocks["vision.mlp_width"] or 4 * width
    found["vision.pool_mlp_width"] = 0 if pool_width in (0, mlp_width) else pool_width
    return found | blocks


def _infer_text(tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the text tower that its tensors tell, and embed_dim."""
    vocab_size, width = _shape(tensors, "token_embedding.weight", 2)
    found: dict[str, Any] = {"text.vocab_size": vocab_size}
    if fields.get("text.projection") != "none":
        projection = "bias" if "clip.text_projection_bias" in tensors else "linear"
        width, embed_dim = _shape(tensors, "text_projection", 2)
        found |= {"text.projection": projection, "embed_dim": embed_dim}
    if fields.get("text.pool") != "class_token":  # else sinusoidal
        found["text.context_length"] = _shape(tensors, "positional_embedding", 2)[0]
    return found | _infer_blocks("text", tensors, width, fields)


def _infer_blocks(
    tower: str, tensors: Mapping[str, np.ndarray], width: int, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields of a tower's blocks."""
    layers, stated = _count(tensors, _STACKS[tower]), fields.get(f"{tower}.heads")
    heads = stated or max(1, width // 64)
    if not layers:
        raise InputError(f"the {tower} tower has no layers")
    if width > 1024 and not stated:
        problem = f"heads are not stated, and the {tower} tower has width {width}"
        raise InputError(f"{problem}: set --{tower}_heads (ViT-H: 16)")
    if width % heads:
        size = f"the {tower} tower has width {width}"
        advice = f"correct --{tower}_heads or the file beside the weights"
        raise InputError(f"{size}, not divisible by {heads} heads: {advice}")
    first = f"{_STACKS[tower]}.resblocks.0."
    hidden = tensors.get(f"{first}mlp.c_fc.weight")
    mlp_width = 0 if hidden is None or len(hidden) == 4 * width else len(hidden)
    names = {"width": width, "layers": layers, "heads": heads, "mlp_width": mlp_width}
    names |= {"gated": f"{first}mlp.gate.weight" in tensors}
    names |= {"inner_norms": f"{first}attn.ln.weight" in tensors}
    return {f"{tower}.{name}": value for name, value in names.items()}


def _fit_lengths(source: Source, text: TextConfig, num_frames: int) -> dict[str, Any]:
    """Returns max_words and max_frames, and crops the learned matrices to them if allowed.

    `num_frames` is the default of max_frames.
    """
    official, tensors, options = source.official, source.tensors, source.options
    context = text.context_length
    limits = {"max_words": (3, 32 if official else context)}  # the release's
    limits["max_frames"] = 1, num_frames
    lengths, is_tight = {}, any(name.startswith("cross.") for name in tensors)
    for option, (minimum, default) in limits.items():
        fixed = len(tensors.get(_MATRICES[option][0], ()))
        maximum = context
        if option == "max_frames":  # plain CLIP has no positions of frames
            # The tight head has a position for the sentence, too.
            maximum = context - is_tight if official else MAX_FRAMES
        lengths[option] = length = getattr(options, option) or fixed or min(default, maximum)
        if fixed and (length > fixed or (length < fixed and not options.crop_matrices)):
            hint = "; --crop_matrices crops them" if length < fixed else ""
            matrices = f"the learned matrices are for length {fixed}{hint}"
            raise InputError(f"--{option}={length}: {matrices}")
        if option == "max_words" and text.pool == "last" and length != context:
            raise InputError(f"--{option}={length}: must be {context}, which texts are padded to")
        if not minimum <= length <= maximum:
            allowed = f"from {minimum} to {maximum}"
            allowed += f", by the text tower's {context} positions" * (maximum != MAX_FRAMES)
            raise InputError(f"--{option}={length}: must be {allowed}")
        for name in tensors.keys() & set(_MATRICES[option] if length < fixed else ()):
            tensors[name] = tensors[name][:length, :length]
    return lengths


def _count(tensors: Mapping[str, np.ndarray], prefix: str) -> int:
    """Returns the number of layers, which is the highest layer index plus 1."""
    pattern = re.compile(rf"{re.escape(prefix)}\.resblocks\.(\d{{1,4}})\.")
    return 1 + max((int(m[1]) for name in tensors if (m := pattern.match(name))), default=-1)
