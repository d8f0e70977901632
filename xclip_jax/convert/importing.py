"""Imports PyTorch checkpoints of any supported kind into model directories, without PyTorch."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xclip_jax.checkpoint import init_params, save_model
from xclip_jax.cli import InputError, list_some
from xclip_jax.convert.architecture import infer
from xclip_jax.convert.mapping import BUFFERS, UNREAD, to_params
from xclip_jax.convert.reading import Options, read_source
from xclip_jax.convert.videoprism import SENTENCEPIECE_URL
from xclip_jax.data import text
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.models import ModelConfig, XClip
from xclip_jax.models.config import check_model


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A model read from a PyTorch checkpoint."""

    kind: str  # a description of the checkpoint to print
    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None
    unread: dict[str, np.ndarray]  # weights that the release saves and never uses
    skipped: list[str]  # tensors that are no weights


def import_model(source: str | Path, options: Options = Options()) -> Imported:
    """Reads a checkpoint file, a Hugging Face folder or a hub id as a model.

    Raises InputError if the source cannot be read, is of an unknown kind or does not fit.
    """
    read = read_source(source, options)
    config, vocab, tokenizer = infer(read), read.options.vocab, None
    check_config(config)
    shapes = jax.eval_shape(lambda: init_params(XClip(config), 0))
    if config.towers != "both":  # a half of a model has no scale of cosines
        read.tensors.setdefault("clip.logit_scale", np.array(math.log(1 / 0.07), np.float32))
    params, unused = to_params(read.tensors, shapes)
    unread = {name: unused.pop(name) for name in UNREAD if name in unused}
    skipped = [name for name in unused if BUFFERS.fullmatch(name)]
    if unknown := sorted(unused.keys() - skipped):
        raise InputError(f"{source}: unknown weights: {list_some(unknown)}")
    if vocab is not None and config.towers != "vision":
        load = functools.partial(text.load_tokenizer, clean=read.settings.clean)
        tokenizer, size = load(vocab, config.max_words), config.text.vocab_size
        if (ids := tokenizer.vocab_size) > size:
            raise InputError(f"{vocab} has {ids} ids, but the text tower has {size}")
        ends, start = bool(tokenizer.special_tokens[1]), bool(tokenizer.special_tokens[0])
        if ends != config.text.end_token:
            problem = f"{vocab} ends texts with {'an' if ends else 'no'} end token"
            raise InputError(f"{problem}, unlike the model: set --vocab to its own tokenizer")
        if config.text.pool == "class_token" and ids != size:  # a truncated file may be valid
            problem = f"{vocab} has {ids} pieces, but the text tower has {size}"
            raise InputError(f"{problem}: download sentencepiece.model from {SENTENCEPIECE_URL}")
        if config.text.pool == "class_token":  # which does not tell
            words = dataclasses.replace(config.text, start_token=start)
            config = dataclasses.replace(config, text=words)
        if config.text.pool == "end" and tokenizer.end != (end := config.text.end_id):
            problem = f"{vocab} ends texts by the id {tokenizer.end}"
            raise InputError(f"{problem}, but config.json has eos_token_id {end}")
    model = {"config": config, "params": params, "tokenizer": tokenizer}
    return Imported(kind=read.kind, **model, unread=unread, skipped=skipped)


def check_config(config: ModelConfig) -> None:
    """Raises InputError if an inferred architecture does not fit together."""
    try:
        check_model(config)
    except ValueError as error:
        raise InputError(f"the model is not supported: {error}") from None


def convert(source: str | Path, output: str | Path, options: Options = Options()) -> None:
    """Converts a checkpoint to a model directory, atomically, and prints a summary.

    Args:
        source: checkpoint file, Hugging Face folder or hub id.
        output: folder to write.
        options: settings that the checkpoint does not store.

    Raises InputError as `import_model`.
    """
    model = import_model(source, options)
    config = model.config
    extra = {"step": 0} if Path(source).exists() else {"step": 0, "base_model": str(source)}
    others = {"tokenizer": model.tokenizer, "unread": model.unread, "extra": extra}
    save_model(output, config, model.params, **others)
    parts = describe(config, model.params, model.tokenizer)
    print(f"{model.kind}: {parts.pop('parameters')} parameters")
    print("\n".join(f"  {name:13}{text}" for name, text in parts.items()))
    if model.unread:
        print(f"  kept unread  {', '.join(model.unread)} (saved by the release, never used)")
    if model.skipped:
        print(f"  skipped      {', '.join(model.skipped).replace('clip.', '')} (no weights)")
    print(f"wrote {output}")


def describe(config: ModelConfig, params: Any, tokenizer: text.Tokenizer | None) -> dict[str, str]:
    """Returns descriptions of the parts of a model by their names, to be shown."""
    v, t, temporal, p = config.vision, config.text, config.temporal.type, config.preprocess
    layers = f", {config.temporal.layers} layers" if temporal == "transformer" else ""
    ids = "none: texts cannot be encoded; convert again with --vocab"
    ids += f"=sentencepiece.model, from {SENTENCEPIECE_URL}" * (t.pool == "class_token")
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    mean, std = (", ".join(f"{x:.3g}" for x in vars(p)[name]) for name in ("mean", "std"))
    kind = "video" if v.num_frames else "image"
    relating = f" + {v.temporal_layers} over time + {v.joint_layers} over space and time"
    relating *= bool(v.num_frames)
    activations = {tower.activation or config.activation for tower in (v, t)}
    spread = ", spread over the whole video" * p.spread
    parts = {
        "parameters": f"{total / 1e6:.1f} M",
        "activation": ", ".join(sorted(activations)),
        "images": f"{p.resize}, {p.interpolation}; mean {mean}; standard deviation {std}",
        f"{kind} tower": f"{v.image_size} px, patch {v.patch_size}, width {v.width}, "
        f"{v.layers} layers{relating}, heads of width {v.width // v.heads}",
        "text tower": f"{t.vocab_size} ids, {t.context_length} positions, width {t.width}, "
        f"{t.layers} layers, heads of width {t.width // t.heads}",
        "head": f"{config.head} (preset {config.preset}; temporal encoder {temporal}{layers})",
        "lengths": f"{config.max_words} words, {config.max_frames} frames{spread}",
        "tokenizer": ids if tokenizer is None else f"{tokenizer.vocab_size} ids",
    }
    absent = {"vision": "text tower", "text": f"{kind} tower"}.get(config.towers)
    return {name: text for name, text in parts.items() if name != absent}
