"""Initialises models from CLIP or other encoders, as the PyTorch release does from CLIP.

Both towers come from it. The blocks of the temporal encoder (or of the tight head) are the first
blocks of CLIP's text tower, and its positions are the text positions.
"""

import dataclasses
import operator
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from xclip_jax.checkpoint import load_model, model_folder, read_config
from xclip_jax.cli import InputError
from xclip_jax.config import get_config, validate
from xclip_jax.convert.reading import is_importable
from xclip_jax.convert.videoprism import SENTENCEPIECE_URL
from xclip_jax.models import ModelConfig
from xclip_jax.models.families import PUBLISHED
from xclip_jax.models.towers import resize_positions

_OPENAI = "https://openaipublic.azureedge.net/clip/models"
_FILES = {  # patch size -> OpenAI's weights of width 768
    32: "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    16: "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
}
_VOCABULARY = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
_VOCABULARIES = {"pe": _VOCABULARY, "videoprism": SENTENCEPIECE_URL}  # by family of PUBLISHED
PyTree = Any


def encoder_fields(config: ModelConfig) -> list[str]:
    """Returns the dotted names of the fields of a ModelConfig that describe its encoders."""
    names = ["embed_dim", "activation", "max_scale"]
    for section in ("vision", "text", "preprocess"):
        fields = dataclasses.fields(getattr(config, section))
        names += [f"{section}.{field.name}" for field in fields]
    return names


def adopt_encoders(config: Any, chosen: Collection[str] = ()) -> None:
    """Sets fields of `config.model` to those of the encoders in `config.init.clip`.

    Fields that are not at their defaults stay as they are, and so do those in `chosen`, dotted
    names such as "model.max_words", which the command line sets. Only the lengths become what the
    encoders read, whatever they are: `model.max_words` all positions if they pad texts to these,
    else no more, and `model.max_frames` that of a model with a video tower.
    A model without a tokenizer, or no model at all, is left to `train` to report. Raises InputError
    if model.json is corrupted, the encoders are others than fields that are set, or a half, or the
    config is not valid then.
    """
    folder = model_folder(config.init.clip)
    if not config.init.clip or not (folder / "model.json").is_file():
        validate(config)
        return
    (_, theirs), defaults = read_config(folder), get_config().model
    changes, problems = {}, _half(theirs)
    for field in encoder_fields(theirs):
        get, name = operator.attrgetter(field), f"model.{field}"
        ours, default, value = get(config.model), get(defaults), get(theirs)
        may_differ = field == "vision.image_size" or (field == "text.vocab_size" and not ours)
        if ours == default and name not in chosen:
            changes[name] = value
        elif ours != value and not may_differ:
            problems.append(f"config.{name} = {ours!r}: must be {value!r}")
    if "model.max_words" not in chosen:
        words, positions = config.model.max_words, theirs.text.context_length
        pads_all = theirs.text.pool == "last"
        changes["model.max_words"] = positions if pads_all else min(words, positions)
    if theirs.vision.num_frames and "model.max_frames" not in chosen:
        changes["model.max_frames"] = theirs.max_frames
    if problems:
        raise InputError(f"config.init.clip = {config.init.clip}: {'; '.join(problems)}")
    config.update_from_flattened_dict(changes)
    validate(config)


def _half(config: ModelConfig) -> list[str]:
    """Returns what is wrong with a model of one tower, of which no training can start."""
    return [] if config.towers == "both" else [f"it has a {config.towers} tower only"]


def start_from_clip(
    params: PyTree, config: ModelConfig, directory: str
) -> tuple[PyTree, list[tuple[str, int, str]]]:
    """Returns parameters with the encoders of another model, and the source of each part.

    Args:
        params: newly initialised parameters of the model to train.
        config: its architecture.
        directory: a model directory written by `xclip_jax.convert`.

    Returns:
        (params, rows): a row is (part, number of parameters, source).

    Raises InputError if there is no model, or its encoders are others; all differences are named.
    """
    _, model, source, _ = load_model(model_folder(directory))
    problems = []
    for field in encoder_fields(config):
        ours, theirs = map(operator.attrgetter(field), (config, model.config))
        if ours != theirs and field != "vision.image_size":
            problems.append(f"config.model.{field} = {ours!r}: must be {theirs!r}")
    problems += _half(model.config)
    if problems:
        raise InputError(f"config.init.clip = {directory}: {'; '.join(problems)}")
    clip, sources = dict(source["clip"]), dict.fromkeys(source["clip"], "CLIP")
    former, vision = model.config.vision, config.vision
    if former.image_size != vision.image_size:
        grid = vision.grid, vision.grid
        resized = resize_positions(clip["visual"]["positions"], former, grid)
        clip["visual"] = {**clip["visual"], "positions": resized}
        sizes = f"from {former.image_size} to {vision.image_size} pixels"
        sources["visual"] += f", positions interpolated {sizes}"
    result = {**params, "clip": clip}
    parts = [(f"clip/{name}", clip[name], sources[name]) for name in clip]
    for name in params.keys() - {"clip"}:
        result[name], text = _take_text_blocks(params[name], clip["textual"])
        if name in ("aggregation_matrices", "log_tau", "logit_bias"):
            text = "identity" if name == "aggregation_matrices" else "constant"
        if name == "logit_bias" and name in source:
            result[name], text = source[name], "CLIP"
        parts.append((name, result[name], text))
    return result, [(name, sum(map(jnp.size, jax.tree.leaves(x))), text) for name, x, text in parts]


def how_to_convert(directory: str, patch_size: int) -> str:
    """Returns instructions for downloading encoders and converting them to a model directory."""
    path = Path(directory)
    if (model_folder(directory) / "model.json").is_file():
        return "convert it again with --vocab"
    if path.is_dir() and is_importable(path):
        output = f"models/{path.resolve().name}"
        command = f"python -m xclip_jax.convert --input={directory} --output={output}"
        return f"it is not converted: run {command} and pass {output}"
    if (word := Path(directory).name) in PUBLISHED:
        command = f"python -m xclip_jax.convert --input={PUBLISHED[word]} --output={directory}"
        if vocabulary := _VOCABULARIES.get(word.partition("_")[0]):
            command += f" --vocab={Path(vocabulary).name} (from {vocabulary})"
        advice = "without a network, download its files first and pass their folder"
        return f"run {command}; {advice}"
    if path.name not in ("clip_b32", "clip_b16"):
        command = f"python -m xclip_jax.convert --input=CHECKPOINT --output={directory}"
        return f"run {command}, with a checkpoint or hub id of docs/encoders.md"
    file = _FILES.get(patch_size, "CHECKPOINT")
    files = f"{_OPENAI}/{file} and {_VOCABULARY}"
    flags = f"--input={Path(file).name} --output={directory} --vocab={Path(_VOCABULARY).name}"
    return f"download {files}, then run python -m xclip_jax.convert {flags}"


def _take_text_blocks(fresh: PyTree, textual: PyTree) -> tuple[PyTree, str]:
    """Returns (parameters, source) of a Transformer: CLIP's first text blocks if shapes match."""
    blocks = fresh.get("encoder", {}).get("blocks") if isinstance(fresh, dict) else None
    if blocks is None:
        return fresh, "random"
    layers = len(jax.tree.leaves(blocks)[0])
    first = jax.tree.map(lambda x: x[:layers], textual["encoder"]["blocks"])
    if jax.tree.map(jnp.shape, blocks) != jax.tree.map(jnp.shape, first):
        return fresh, "random: CLIP's text tower has blocks of another size, or fewer"
    result = {**fresh, "encoder": {"blocks": first}}
    source = f"the first {layers} blocks of CLIP's text tower"
    if "positions" in fresh and "positions" in textual:
        positions, count = textual["positions"], len(fresh["positions"])
        result["positions"] = positions
        source += " and its positions"
        if count != len(positions):
            shape = count, positions.shape[1]
            result["positions"] = jax.image.resize(positions, shape, "linear", antialias=False)
            source += f", interpolated from {len(positions)} to {count}"
    others = sorted(fresh.keys() - {"encoder", *(textual.keys() & {"positions"})})
    return result, source + (f"; {', '.join(others)} random" if others else "")
