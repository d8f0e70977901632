"""Imports a PyTorch checkpoint into a model directory."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from xclip_jax.checkpoint import init_params, save_model
from xclip_jax.cli import InputError
from xclip_jax.convert.mapping import BUFFERS, UNREAD, to_params
from xclip_jax.convert.sources import Source, read_source
from xclip_jax.data.text import Tokenizer, load_tokenizer
from xclip_jax.models import ModelConfig, XClip, read_model_config

_MATRICES = {
    "max_words": ("word_logit_weight", "word_mat_weight", "word_mat_weight2"),
    "max_frames": ("frame_logit_weight", "frame_mat_weight", "frame_mat_weight2"),
}
_HEADS = {  # by prefix of a tensor; the last that occurs counts
    "lstm_visual.": "seq_lstm",
    "transformerClip.": "seq_transformer",
    "cross.transformer.": "tight_transformer",
    "global_mat_weight": "xclip",
}
MAX_IMAGE_SIZE = 4096  # in pixels, far above any CLIP: limits what a corrupted file allocates
_LENGTHS = {"max_words": 32, "max_frames": 12}  # in the release's scripts


def convert(
    source: str | Path,
    output: str | Path,
    *,
    vocab: str | Path | None = None,
    head: Literal["mean_pooling", "xclip"] | None = None,
    activation: Literal["quick_gelu", "gelu"] | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    max_words: int | None = None,
    max_frames: int | None = None,
    crop_matrices: bool = False,
) -> None:
    """Converts a checkpoint to a model directory, atomically, and prints a summary.

    Args:
        source: checkpoint file, Hugging Face folder or hub id.
        output: folder to write.
        vocab: tokenizer, as in `load_tokenizer`; default: the source's, if it has one.
        head: head for plain CLIP, by default `mean_pooling`.
        activation, vision_heads, text_heads: settings that only a config.json stores.
        max_words, max_frames: lengths, which must match those of the learned matrices, if any.
        crop_matrices: crop learned matrices to shorter lengths.

    Raises:
        InputError: the source cannot be read, is of an unknown kind or does not fit.
    """
    options = {"vision_heads": vision_heads, "text_heads": text_heads}
    options |= {"max_words": max_words, "max_frames": max_frames}
    for name, value in options.items():
        if value is not None and value < 1:
            raise InputError(f"--{name}={value}: must be at least 1")
    read = read_source(source)
    tensors = read.tensors
    if not read.heads:
        read.activation = activation or read.activation
        heads = {"vision": vision_heads, "text": text_heads}
        read.heads |= {name: count for name, count in heads.items() if count}
    elif activation or vision_heads or text_heads:
        raise InputError(
            f"{source}: its config.json sets activation and heads: omit --activation, "
            "--vision_heads and --text_heads"
        )
    if crop_matrices and not (max_words or max_frames):
        raise InputError("--crop_matrices requires --max_words or --max_frames")
    _set_lengths(tensors, {"max_words": max_words, "max_frames": max_frames}, crop_matrices)
    known = {"activation": read.activation, **_infer_kind(read, head)}
    config = infer(tensors, known, read.heads, max_words, max_frames)
    weights = {name: array for name, array in tensors.items() if not BUFFERS.fullmatch(name)}
    params, unused = to_params(weights, _template(config))
    unread = {name: unused.pop(name) for name in UNREAD if name in unused}
    if unused:
        raise InputError(f"{source}: unknown weights: {', '.join(sorted(unused))}")
    tokenizer = _tokenizer(vocab, read.tokenizer, config)
    extra = {"step": 0}
    save_model(output, config, params, tokenizer=tokenizer, unread=unread, extra=extra)
    skipped = [name.removeprefix("clip.") for name in tensors if name not in weights]
    notes = {"kept unread": list(unread), "skipped": skipped}
    _print_summary(read, config, params, tokenizer, notes=notes)
    print(f"wrote {output}")


def _template(config: ModelConfig) -> Any:
    """Returns the parameters' shapes and types as a pytree of ShapeDtypeStructs."""
    return jax.eval_shape(lambda: init_params(XClip(config), 0))


def infer(
    tensors: Mapping[str, np.ndarray],
    known: Mapping[str, str],
    heads: Mapping[str, int],
    max_words: int | None = None,
    max_frames: int | None = None,
) -> ModelConfig:
    """Returns the ModelConfig of a checkpoint, from the names and shapes of its tensors.

    Args:
        tensors: official name -> array.
        known: preset, head and activation.
        heads: number of heads by tower, "vision" and "text"; by default width / 64.
        max_words, max_frames: as in `convert`.

    Raises:
        InputError: sizes are missing or do not fit together.
    """
    model: dict[str, Any] = dataclasses.asdict(ModelConfig()) | dict(known)
    model["vision"], model["text"], model["embed_dim"] = _infer_towers(tensors, heads)
    temporal = model["temporal"]
    temporal["type"] = "none"
    for name, kind in (("lstm_visual.", "lstm"), ("transformerClip.", "transformer")):
        if any(tensor.startswith(name) for tensor in tensors):
            temporal["type"] = kind
    layers = max(_count(tensors, "transformerClip"), _count(tensors, "cross.transformer"))
    temporal.update(layers=layers or 1, heads=max(1, model["embed_dim"] // 64))
    context = model["text"]["context_length"]
    defaults = _LENGTHS | ({"max_words": context} if model["preset"] == "paper" else {})
    for name, length in (("max_words", max_words), ("max_frames", max_frames)):
        matrix = tensors.get(_MATRICES[name][0])
        size = len(matrix) if matrix is not None else length or min(defaults[name], context)
        minimum = 3 if name == "max_words" else 1
        if not minimum <= size <= context:
            raise InputError(
                f"--{name}={size}: must be from {minimum} to {context}, the text tower's positions"
            )
        model[name] = size
    return read_model_config(model)


def _infer_kind(source: Source, head: str | None) -> dict[str, str]:
    """Returns preset and head, inferred from the tensors outside the CLIP towers."""
    if not source.official:
        return {"preset": "paper", "head": head or "mean_pooling"}
    if head:
        raise InputError(f"--head={head}: the checkpoint has its own head: omit --head")
    head = "mean_pooling"
    for prefix, name in _HEADS.items():
        if any(tensor.startswith(prefix) for tensor in source.tensors):
            head = name
    return {"preset": "official", "head": head}


def _infer_towers(
    tensors: Mapping[str, np.ndarray], heads: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int], int]:
    """Returns the sizes of both towers and embed_dim, inferred from the tensors' shapes."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        array = tensors.get(f"clip.{name}")
        if array is None or array.ndim != dimensions or not array.size:
            problem = "missing" if array is None else f"of shape {array.shape}"
            raise InputError(f"{name} is {problem}: cannot infer the sizes of CLIP")
        return array.shape

    width, _, patch, _ = shape("visual.conv1.weight", 4)
    grid = math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
    text_width, embed_dim = shape("text_projection", 2)
    if not 0 < grid * patch <= MAX_IMAGE_SIZE:
        raise InputError(f"image size {grid * patch}: must be from 1 to {MAX_IMAGE_SIZE} px")
    vision = {
        "image_size": grid * patch,
        "patch_size": patch,
        "width": width,
        "layers": _count(tensors, "clip.visual.transformer"),
    }
    text = {
        "vocab_size": shape("token_embedding.weight", 2)[0],
        "context_length": shape("positional_embedding", 2)[0],
        "width": text_width,
        "layers": _count(tensors, "clip.transformer"),
    }
    for name, tower in (("vision", vision), ("text", text)):
        tower["heads"] = heads.get(name) or max(1, tower["width"] // 64)
        if tower["width"] % tower["heads"] or not tower["layers"]:
            raise InputError(
                f"the {name} tower has {tower['layers']} layers and width {tower['width']}, not "
                f"divisible by {tower['heads']} heads: set --{name}_heads"
            )
    return vision, text, embed_dim


def _count(tensors: Mapping[str, np.ndarray], prefix: str) -> int:
    """Returns the number of layers, which is the highest layer index plus 1."""
    pattern = re.compile(rf"{re.escape(prefix)}\.resblocks\.(\d{{1,4}})\.")
    return 1 + max((int(m[1]) for name in tensors if (m := pattern.match(name))), default=-1)


def _set_lengths(
    tensors: dict[str, np.ndarray], lengths: Mapping[str, int | None], crop: bool
) -> None:
    """Checks lengths against the learned matrices, or crops the matrices in place."""
    for option, names in _MATRICES.items():
        for name in names:
            matrix, size = tensors.get(name), lengths[option]
            if matrix is None or size is None or matrix.shape[0] == size:
                continue
            if not crop or size > matrix.shape[0]:
                hint = "; --crop_matrices crops them" if size < matrix.shape[0] else ""
                raise InputError(
                    f"--{option}={size}: the learned matrices are for length "
                    f"{matrix.shape[0]}{hint}"
                )
            tensors[name] = matrix[:size, :size]


def _tokenizer(
    vocab: str | Path | None, folder: Path | None, config: ModelConfig
) -> Tokenizer | None:
    """Returns the tokenizer at `vocab`, else the source's, else None."""
    if vocab is None and folder is not None:
        names = ("tokenizer.json", "vocab.json")
        vocab = folder if any((folder / name).is_file() for name in names) else None
    if vocab is None:
        return None
    tokenizer = load_tokenizer(vocab, config.max_words)
    size = config.text.vocab_size
    if tokenizer.vocab_size > size:
        raise InputError(f"{vocab} has {tokenizer.vocab_size} ids, but the text tower has {size}")
    return tokenizer


def _print_summary(
    read: Source,
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer | None,
    *,
    notes: Mapping[str, list[str]],
) -> None:
    vision, text, temporal = config.vision, config.text, config.temporal.type
    layers = f", {config.temporal.layers} layers" if temporal == "transformer" else ""
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{read.kind}: {total / 1e6:.1f} M parameters")
    print(f"  activation   {config.activation}")
    print(
        f"  image tower  {vision.image_size} px, patch {vision.patch_size}, "
        f"width {vision.width}, {vision.layers} layers, {vision.heads} heads"
    )
    print(
        f"  text tower   {text.vocab_size} ids, {text.context_length} positions, "
        f"width {text.width}, {text.layers} layers, {text.heads} heads"
    )
    preset = f"preset {config.preset}; temporal encoder {temporal}{layers}"
    print(f"  head         {config.head} ({preset})")
    print(f"  lengths      {config.max_words} words, {config.max_frames} frames")
    reasons = {"kept unread": "saved by the release, never used", "skipped": "no weights"}
    for note, names in notes.items():
        if names:
            print(f"  {note:12} {', '.join(names)} ({reasons[note]})")
    if tokenizer is None:
        print("  tokenizer    none: texts cannot be encoded; convert again with --vocab")
    else:
        print(f"  tokenizer    {tokenizer.vocab_size} ids")
