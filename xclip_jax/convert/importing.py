"""A PyTorch checkpoint -> a model directory."""

import json
import math
import re

import jax

from xclip_jax.checkpoint import init_params, save_model
from xclip_jax.cli import InputError
from xclip_jax.config import get_config
from xclip_jax.convert.mapping import BUFFERS, UNREAD, to_params
from xclip_jax.convert.sources import read_source
from xclip_jax.data.text import load_tokenizer
from xclip_jax.models import build_model, resolve

_MATRICES = {
    "max_words": ("word_logit_weight", "word_mat_weight", "word_mat_weight2"),
    "max_frames": ("frame_logit_weight", "frame_mat_weight", "frame_mat_weight2"),
}
_HEADS = {  # the last that is there counts
    "lstm_visual.": "seq_lstm",
    "transformerClip.": "seq_transformer",
    "cross.transformer.": "tight_transformer",
    "global_mat_weight": "xclip",
}
_LENGTHS = {"max_words": 32, "max_frames": 12}  # of the release's scripts


def convert(
    source,
    output,
    vocab=None,
    head=None,
    activation=None,
    vision_heads=None,
    text_heads=None,
    max_words=None,
    max_frames=None,
    crop_matrices=False,
):
    """Writes a model directory whole or not at all, and prints what was made of what.

    Args:
        source: checkpoint file, Hugging Face folder or hub id.
        output: folder to write.
        vocab: what `load_tokenizer` takes; default: the source's own, if it has one.
        head: of plain CLIP, `mean_pooling` (default) or `xclip`.
        activation, vision_heads, text_heads: where the file does not tell.
        max_words, max_frames: lengths; tied to the learned matrices where there are any.
        crop_matrices: take their leading block where other lengths are asked for.

    Raises:
        InputError: the source is not readable, not known, or does not fit.
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
        asked = {"vision": vision_heads, "text": text_heads}
        read.heads |= {name: count for name, count in asked.items() if count}
    elif activation or vision_heads or text_heads:
        raise InputError(
            f"{source}: its config.json tells activation and heads; leave out --activation, "
            "--vision_heads and --text_heads"
        )
    if crop_matrices and not (max_words or max_frames):
        raise InputError("--crop_matrices goes with --max_words or --max_frames")
    _set_lengths(tensors, {"max_words": max_words, "max_frames": max_frames}, crop_matrices)
    model = {"activation": read.activation, **_kind(read, head)}
    architecture = infer(tensors, model, read.heads, max_words, max_frames)
    model = build_model(architecture)
    template = jax.eval_shape(lambda: init_params(model, architecture, 0))
    weights = {name: array for name, array in tensors.items() if not BUFFERS.fullmatch(name)}
    params, left = to_params(weights, template)
    unread = {name: left.pop(name) for name in UNREAD if name in left}
    if left:
        raise InputError(f"{source}: unknown weights: {', '.join(sorted(left))}")
    tokenizer = _tokenizer(vocab, read.tokenizer, architecture)
    save_model(output, architecture, params, tokenizer, unread)
    skipped = [name.removeprefix("clip.") for name in tensors if name not in weights]
    _print_summary(read, architecture, params, unread, skipped, tokenizer, output)


def infer(tensors, known, heads, max_words=None, max_frames=None):
    """model.json of a checkpoint, from the names and shapes of its tensors.

    Args:
        tensors: official name -> array.
        known: preset, head and activation.
        heads: of "vision" and "text", where known; else width / 64.
        max_words, max_frames: as `convert`'s.

    Raises:
        InputError: sizes cannot be told or do not fit together.
    """
    model = json.loads(get_config().model.to_json()) | known
    model["vision"], model["text"], model["embed_dim"] = _towers(tensors, heads)
    temporal = model["temporal"]
    temporal["type"] = "none"
    for name, kind in (("lstm_visual.", "lstm"), ("transformerClip.", "transformer")):
        if any(tensor.startswith(name) for tensor in tensors):
            temporal["type"] = kind
    layers = max(_count(tensors, "transformerClip"), _count(tensors, "cross.transformer"))
    temporal.update(layers=layers or 1, heads=max(1, model["embed_dim"] // 64))
    context = model["text"]["context_length"]
    defaults = _LENGTHS | ({"max_words": context} if model["preset"] == "paper" else {})
    for name, asked in (("max_words", max_words), ("max_frames", max_frames)):
        matrix = tensors.get(_MATRICES[name][0])
        size = len(matrix) if matrix is not None else asked or min(defaults[name], context)
        least = 3 if name == "max_words" else 1
        if not least <= size <= context:
            raise InputError(f"--{name}={size}: must be from {least} to {context}, the positions")
        model[name] = size
    return {**resolve(model), "step": 0}


def _kind(read, head):
    """Preset and head, by what is there besides the towers."""
    if not read.official:
        return {"preset": "paper", "head": head or "mean_pooling"}
    if head:
        raise InputError(f"--head={head}: the checkpoint has a head of its own; leave it out")
    found = "mean_pooling"
    for marker, name in _HEADS.items():
        if any(tensor.startswith(marker) for tensor in read.tensors):
            found = name
    return {"preset": "official", "head": found}


def _towers(tensors, heads):
    """(vision, text, embed_dim), from shapes."""

    def shape(name, dimensions):
        found = tensors.get(f"clip.{name}")
        if found is None or found.ndim != dimensions or not found.size:
            found = "missing" if found is None else f"of shape {found.shape}"
            raise InputError(f"{name} is {found}; the sizes of CLIP cannot be told")
        return found.shape

    width, _, patch, _ = shape("visual.conv1.weight", 4)
    grid = math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
    text_width, embed_dim = shape("text_projection", 2)
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
                f"the {name} tower has {tower['layers']} layers and width {tower['width']}, which "
                f"{tower['heads']} heads cannot share; see --{name}_heads"
            )
    return vision, text, embed_dim


def _count(tensors, prefix):
    """Number of layers: one more than the highest."""
    pattern = re.compile(rf"{re.escape(prefix)}\.resblocks\.(\d{{1,4}})\.")
    return 1 + max((int(m[1]) for name in tensors if (m := pattern.match(name))), default=-1)


def _set_lengths(tensors, asked, crop):
    """Checks lengths against the learned matrices they are tied to, or cuts these in place."""
    for option, names in _MATRICES.items():
        for name in names:
            matrix, size = tensors.get(name), asked[option]
            if matrix is None or size is None or matrix.shape[0] == size:
                continue
            if not crop or size > matrix.shape[0]:
                hint = "; --crop_matrices cuts them" if size < matrix.shape[0] else ""
                raise InputError(
                    f"--{option}={size}: the learned matrices are for {matrix.shape[0]}{hint}"
                )
            tensors[name] = matrix[:size, :size]


def _tokenizer(vocab, folder, architecture):
    """The tokenizer asked for, or the source's own; None if it has none."""
    if vocab is None and folder is not None:
        names = ("tokenizer.json", "vocab.json")
        vocab = folder if any((folder / name).is_file() for name in names) else None
    if vocab is None:
        return None
    tokenizer = load_tokenizer(vocab, architecture["max_words"])
    size = architecture["text"]["vocab_size"]
    if tokenizer.vocab_size > size:
        raise InputError(f"{vocab} has {tokenizer.vocab_size} ids, the text tower only {size}")
    return tokenizer


def _print_summary(read, architecture, params, unread, skipped, tokenizer, output):
    a, vision, text = architecture, architecture["vision"], architecture["text"]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{read.kind}: {total / 1e6:.1f} M parameters")
    print(f"  activation   {a['activation']}")
    print(
        f"  image tower  {vision['image_size']} px, patch {vision['patch_size']}, "
        f"width {vision['width']}, {vision['layers']} layers, {vision['heads']} heads"
    )
    print(
        f"  text tower   {text['vocab_size']} ids, {text['context_length']} positions, "
        f"width {text['width']}, {text['layers']} layers, {text['heads']} heads"
    )
    temporal = a["temporal"]["type"]
    layers = f", {a['temporal']['layers']} layers" if temporal == "transformer" else ""
    print(f"  head         {a['head']} (preset {a['preset']}; temporal encoder {temporal}{layers})")
    print(f"  lengths      {a['max_words']} words, {a['max_frames']} frames")
    if unread:
        print(f"  kept unread  {', '.join(unread)} (saved by the release, never used)")
    if skipped:
        print(f"  skipped      {', '.join(skipped)} (no weights)")
    if tokenizer is None:
        print("  tokenizer    none: texts cannot be encoded; convert again with --vocab")
    else:
        print(f"  tokenizer    {tokenizer.vocab_size} ids")
    print(f"wrote {output}")
