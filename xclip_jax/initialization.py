"""Initialises models from CLIP, as the PyTorch release does.

Both towers come from CLIP. The blocks of the temporal encoder (or of the tight head) are the first
blocks of CLIP's text tower, and its positions are the text positions.
"""

import dataclasses
import operator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from xclip_jax.checkpoint import load_model, model_folder
from xclip_jax.cli import InputError
from xclip_jax.models import ModelConfig

_OPENAI = "https://openaipublic.azureedge.net/clip/models"
_FILES = {  # patch size -> OpenAI's weights of width 768
    32: "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    16: "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
}
_VOCABULARY = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
PyTree = Any


def start_from_clip(
    params: PyTree, config: ModelConfig, directory: str
) -> tuple[PyTree, list[tuple[str, int, str]]]:
    """Returns parameters with CLIP's weights, and the source of each part.

    Args:
        params: newly initialised parameters of the model to train.
        config: its architecture.
        directory: a model directory written by `xclip_jax.convert`.

    Returns:
        (params, rows): a row is (part, number of parameters, source).

    Raises InputError if there is no model, or its towers have other sizes; all differences are
    named.
    """
    _, model, source, _ = load_model(model_folder(directory))
    fields = [f"vision.{name}" for name in ("patch_size", "width", "layers", "heads")]
    fields += [f"text.{field.name}" for field in dataclasses.fields(config.text)]
    problems = []
    fields += [f"preprocess.{field.name}" for field in dataclasses.fields(config.preprocess)]
    for field in [*fields, "embed_dim", "activation"]:
        ours, theirs = map(operator.attrgetter(field), (config, model.config))
        if ours != theirs:
            problems.append(f"config.model.{field} = {ours!r}: must be {theirs!r}")
    if problems:
        raise InputError(f"config.init.clip = {directory}: {'; '.join(problems)}")
    clip, sources = dict(source["clip"]), dict.fromkeys(source["clip"], "CLIP")
    former, side = model.config.vision.image_size, config.vision.image_size
    if former != side:
        positions = clip["visual"]["positions"]
        resized = interpolate_positions(positions, side // config.vision.patch_size)
        clip["visual"] = {**clip["visual"], "positions": resized}
        sources["visual"] += f", positions interpolated from {former} to {side} pixels"
    result = {**params, "clip": clip}
    parts = [(f"clip/{name}", clip[name], sources[name]) for name in clip]
    for name in params.keys() - {"clip"}:
        result[name], text = _take_text_blocks(params[name], clip["textual"])
        if name in ("aggregation_matrices", "log_tau", "logit_bias"):
            text = "identity" if name == "aggregation_matrices" else "constant"
        parts.append((name, result[name], text))
    return result, [(name, sum(map(jnp.size, jax.tree.leaves(x))), text) for name, x, text in parts]


def how_to_convert(directory: str, patch_size: int) -> str:
    """Returns instructions for downloading CLIP and converting it to a model directory."""
    file = _FILES.get(patch_size, "CHECKPOINT")
    files = "a CLIP checkpoint and its vocabulary"
    files = f"{_OPENAI}/{file} and {_VOCABULARY}" if patch_size in _FILES else files
    flags = f"--input={Path(file).name} --output={directory} --vocab={Path(_VOCABULARY).name}"
    return f"download {files}, then run python -m xclip_jax.convert {flags}"


def interpolate_positions(positions_LxE: Shaped[Any, "L E"], grid: int) -> Float[Array, "M E"]:
    """Interpolates the positions of a class token and a square of patches to grid x grid patches.

    Bicubic, as usual for a ViT at another resolution (Dosovitskiy et al., 2021, Sec. 3.2).
    """
    token, patches = positions_LxE[:1], positions_LxE[1:]
    side = round(len(patches) ** 0.5)
    square = patches.reshape(side, side, -1)
    resized = jax.image.resize(square, (grid, grid, square.shape[-1]), "bicubic", antialias=False)
    return jnp.concatenate([token, resized.reshape(grid * grid, -1)])


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
    if "positions" in fresh:
        result["positions"] = textual["positions"]
        source += " and its positions"
    others = sorted(fresh.keys() - {"encoder", "positions"})
    return result, source + (f"; {', '.join(others)} random" if others else "")
