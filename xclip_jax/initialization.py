"""Starting from CLIP: which parameters come from where.

As the PyTorch release does: both towers from CLIP; the temporal encoder's (or tight head's) blocks
from the first blocks of CLIP's text tower, its positions from the text positions.
"""

import dataclasses

import jax
import jax.numpy as jnp

from xclip_jax.checkpoint import load_model, model_folder
from xclip_jax.cli import InputError

_OPENAI = "https://openaipublic.azureedge.net/clip/models"
_FILES = {  # patch size -> OpenAI's weights of width 768
    32: "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    16: "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
}
_VOCABULARY = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
_SIZES = {"vision": ("patch_size", "width", "layers", "heads"), "text": None}  # None: all


def start_from_clip(params, model_config, directory):
    """Parameters with CLIP's weights where they fit.

    Args:
        params: fresh parameters of the model to train.
        model_config: its ModelConfig.
        directory: model directory that `xclip_jax.convert` wrote.

    Returns:
        (params, rows): rows of (part, number of parameters, where they come from).

    Raises:
        InputError: there is no model, or its towers are of other sizes; all are named.
    """
    _, model, source, _ = load_model(model_folder(directory))
    theirs = model.config
    _check_sizes(model_config, theirs, directory)
    clip = source["clip"]
    visual = clip["visual"]
    origin = "CLIP"
    side, size = theirs.vision.image_size, model_config.vision.image_size
    if side != size:
        grid = size // model_config.vision.patch_size
        visual = {**visual, "positions": interpolate_positions(visual["positions"], grid)}
        origin = f"CLIP, positions interpolated from {side} to {size} pixels"
    started = {**params, "clip": {**clip, "visual": visual}}
    rows = [("clip/visual", visual, origin)]
    rows += [("clip/textual", clip["textual"], "CLIP"), ("clip/logit_scale", [0], "CLIP")]
    for name in params.keys() - {"clip"}:
        started[name], origin = _from_text_tower(params[name], clip["textual"])
        if name == "aggregation_matrices":
            origin = "identity"
        rows.append((name, started[name], origin))
    return started, [(name, sum(map(jnp.size, jax.tree.leaves(t))), o) for name, t, o in rows]


def how_to_convert(directory, patch_size):
    """What to download for the CLIP of a config, and the command that makes its model directory."""
    file = _FILES.get(patch_size)
    fetch = (
        f"{_OPENAI}/{file} and {_VOCABULARY}" if file else "a CLIP checkpoint and its vocabulary"
    )
    name, vocabulary = (file or "CHECKPOINT").split("/")[-1], _VOCABULARY.split("/")[-1]
    return (
        f"fetch {fetch}, then python -m xclip_jax.convert --input={name} --output={directory} "
        f"--vocab={vocabulary}"
    )


def _check_sizes(ours, theirs, directory):
    problems = []

    def compare(field, a, b):
        if a != b:
            problems.append(f"config.model.{field} = {a!r}: must be {b!r}")

    for tower, fields in _SIZES.items():
        ours_of, theirs_of = (dataclasses.asdict(getattr(c, tower)) for c in (ours, theirs))
        for field in fields or theirs_of:
            compare(f"{tower}.{field}", ours_of[field], theirs_of[field])
    for field in ("embed_dim", "activation"):
        compare(field, getattr(ours, field), getattr(theirs, field))
    if problems:
        raise InputError(f"the CLIP of config.init.clip = {directory}: {'; '.join(problems)}")


def interpolate_positions(positions_LxE, grid):
    """Position embedding of a class token and a square of patches, for `grid` x `grid` patches.

    Bicubic, as usual when a ViT is taken to another resolution (Dosovitskiy et al.,
    2021, Sec. 3.2).
    """
    token, patches = positions_LxE[:1], positions_LxE[1:]
    side = round(len(patches) ** 0.5)
    square = patches.reshape(side, side, -1)
    resized = jax.image.resize(square, (grid, grid, square.shape[-1]), "bicubic", antialias=False)
    return jnp.concatenate([token, resized.reshape(grid * grid, -1)])


def _from_text_tower(fresh, textual):
    """(parameters, origin) of a Transformer: CLIP's first text blocks, if they are of its shape."""
    blocks = fresh.get("encoder", {}).get("blocks")
    if blocks is None:
        return fresh, "random"
    layers = len(jax.tree.leaves(blocks)[0])
    theirs = jax.tree.map(lambda x: x[:layers], textual["encoder"]["blocks"])
    same = jax.tree.map(lambda a, b: a.shape == b.shape, blocks, theirs)
    if not all(jax.tree.leaves(same)):
        return fresh, "random: CLIP's text blocks are of another size, or fewer"
    started = {**fresh, "encoder": {"blocks": theirs}}
    origin = f"the first {layers} blocks of CLIP's text tower"
    if "positions" in fresh:
        started["positions"] = textual["positions"]
        origin += " and its positions"
    others = fresh.keys() - {"encoder", "positions"}
    return started, origin + (f"; {', '.join(sorted(others))} random" if others else "")
