"""Model directories: `model.json`, `params/` (Orbax) and, when known, `tokenizer/`.

A converted one may also hold `unread.safetensors`: what the PyTorch release saves but never reads,
kept for the way back.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from xclip_jax.checkpoint import own_checkpointer
from xclip_jax.data.text import load_tokenizer
from xclip_jax.distributed import is_first
from xclip_jax.errors import InputError
from xclip_jax.models import build_model

UNREAD_FILE = "unread.safetensors"


def model_folder(directory):
    """The model directory at `directory`, which may be a work directory (then: its `model`)."""
    directory = Path(directory)
    if not (directory / "model.json").is_file() and (directory / "model").is_dir():
        return directory / "model"
    return directory


def partial_folder(directory):
    """A new folder beside `directory`, to be filled and then renamed to it.

    It has its own unmistakable name; what a killed run of the same name left is removed.
    """
    partial = Path(directory).with_name(f".{Path(directory).name}.xclip_jax-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def save_model(directory, architecture, params, tokenizer=None, unread=None):
    """Writes a model directory whole or not at all, in place of an older one.

    Args:
        architecture: plain dict, see xclip_jax.models.build_model.
        params: the parameters' pytree.
        tokenizer: a Tokenizer, or None.
        unread: official name -> array, kept for the way back to PyTorch.
    """
    directory = Path(directory).absolute()
    if not is_first():
        return
    partial = partial_folder(directory)
    (partial / "model.json").write_text(json.dumps(architecture, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(partial / "tokenizer")
    if unread:
        save_file(unread, partial / UNREAD_FILE)
    with own_checkpointer() as checkpointer:
        checkpointer.save(partial / "params", jax.tree.map(np.asarray, params))
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


def load_model(directory):
    """Reads a model directory.

    Returns:
        (architecture, model, params, tokenizer): params on the default device; tokenizer None if
        the directory holds none.

    Raises:
        InputError: it is missing or damaged.
    """
    directory = Path(directory).absolute()
    try:
        architecture = json.loads((directory / "model.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no model in {directory}: looked for model.json") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{directory / 'model.json'}: not valid JSON: {error}") from None
    try:
        model = build_model(architecture)
    except (KeyError, TypeError) as error:
        raise InputError(f"{directory / 'model.json'} does not describe a model: {error}") from None
    try:
        with own_checkpointer() as checkpointer:
            # Told to be NumPy, so that they load whatever devices they were saved from.
            shapes = jax.eval_shape(lambda: init_params(model, architecture, 0))
            like = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), shapes)
            params = checkpointer.restore(directory / "params", like)
    except Exception as error:  # Orbax has no one type for a damaged checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{directory / 'params'} cannot be read: {reason}") from None
    _check_shapes(directory, params, shapes)
    params = jax.device_put(params)
    folder = directory / "tokenizer"
    tokenizer = load_tokenizer(folder, model.max_words) if folder.is_dir() else None
    return architecture, model, params, tokenizer


def _check_shapes(directory, params, expected):
    """Orbax hands back an array of another shape than asked for without a word."""
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected), strict=True
    ):
        if found.shape != wanted.shape:
            name = "/".join(entry.key for entry in path)
            raise InputError(
                f"{directory / 'params'} do not fit model.json: {name} has shape {found.shape}, "
                f"must be {wanted.shape}"
            )


def init_params(model, architecture, seed):
    """Fresh parameters."""
    side = architecture["vision"]["image_size"]
    words, frames = (1, model.max_words), (1, model.max_frames)
    return model.init(
        jax.random.key(seed),
        np.zeros(words, np.int32),
        np.ones(words, bool),
        np.zeros((*frames, side, side, 3), np.uint8),
        np.ones(frames, bool),
    )["params"]
