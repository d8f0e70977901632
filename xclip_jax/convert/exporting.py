"""Exports a model directory to the files that PyTorch programs read."""

import json
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from xclip_jax.checkpoint import UNREAD_FILE, load_model, model_folder, partial_folder
from xclip_jax.cli import InputError
from xclip_jax.convert.mapping import to_hugging_face, to_tensors
from xclip_jax.convert.torch_archive import DTYPES
from xclip_jax.models.config import ModelConfig, TextConfig, VisionConfig


def export(directory: str | Path, output: str | Path) -> None:
    """Writes a model as an official state dict and as a `CLIPModel` folder, atomically.

    The state dict is `output`/pytorch_model.bin, the CLIP towers are `output`/clip. A model that
    the official code does not support (preset paper) is exported as its CLIP towers only.

    Raises:
        InputError: `directory` holds no model.
    """
    directory, output = model_folder(directory), Path(output)
    _, model, params, tokenizer = load_model(directory)
    partial = partial_folder(output)
    (partial / "clip").mkdir()
    towers = to_hugging_face(to_tensors({"clip": params["clip"]}))
    unsupported = unsupported_feature(model.config)
    if unsupported is None:
        unread = directory / UNREAD_FILE
        extra = load_file(unread) if unread.is_file() else {}
        write_archive(partial / "pytorch_model.bin", to_tensors(params) | extra)
    save_file(towers, partial / "clip" / "model.safetensors", {"format": "pt"})
    end = model.config.text.vocab_size - 1 if tokenizer is None else tokenizer.end
    start = end - 1 if tokenizer is None else tokenizer.start
    config = clip_config(model.config, start, end)
    (partial / "clip" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(partial / "clip")
    partial.rename(output)
    print(f"{output / 'clip'}: the CLIP towers, for transformers.CLIPModel.from_pretrained")
    if unsupported is None:
        print(f"{output / 'pytorch_model.bin'}: official state dict, for torch.load")
    else:
        print(f"no official state dict: the official code does not support {unsupported}")


def unsupported_feature(config: ModelConfig) -> str | None:
    """Returns the first feature the official X-CLIP and CLIP4Clip do not support, or None."""
    official = {"frame_features": "clip", "words": "all_tokens", "padding": "competes"}
    official |= {"matrices": True, "fusion": "mean", "aggregation": "attention"}
    if config.head != "xclip":
        official = {}
    for field, value in official.items():
        if getattr(config, field) != value:
            return f"model.{field} = {getattr(config, field)}"
    if config.head == "xclip" and len(config.granularities) < 4:
        return f"model.granularities = {', '.join(config.granularities)}"
    if config.temporal.type != "none" and not config.temporal.residual:
        return "model.temporal.residual = False"
    # The rest are constants of the official code, which its checkpoints do not store.
    towers = {"vision": config.vision.width, "text": config.text.width}
    if config.temporal.type == "transformer" or config.head == "tight_transformer":
        towers["temporal"] = config.embed_dim
    for name, width in towers.items():
        heads = getattr(config, name).heads
        if heads != max(1, width // 64):
            return f"model.{name}.heads = {heads} (must be width / 64)"
    if config.activation != "quick_gelu":
        return f"model.activation = {config.activation}"
    if config.head == "xclip" and config.tau != 0.01:
        return f"model.tau = {config.tau}"
    return None


def clip_config(config: ModelConfig, start: int, end: int) -> dict[str, Any]:
    """Returns the config.json of a `CLIPModel` with `start` and `end` as token ids."""

    def tower(sizes: VisionConfig | TextConfig, **more: Any) -> dict[str, Any]:
        return {
            "hidden_size": sizes.width,
            "intermediate_size": 4 * sizes.width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "hidden_act": config.activation,
            "projection_dim": config.embed_dim,
            "layer_norm_eps": 1e-5,
            **more,
        }

    vision, text = config.vision, config.text
    image = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    words = {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "bos_token_id": start,
        "eos_token_id": end,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": tower(text, **words, model_type="clip_text_model"),
        "vision_config": tower(vision, **image, model_type="clip_vision_model"),
    }


def write_archive(path: str | os.PathLike, tensors: Mapping[str, Any]) -> None:
    """Writes {name: array} atomically to a file that torch.load reads as an OrderedDict.

    Raises:
        InputError: an array has a type that PyTorch does not support.
    """
    path = Path(path)
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            raise InputError(f"{path}: cannot store {name}: PyTorch has no type {array.dtype}")
    partial = path.with_name(path.name + ".part")
    with zipfile.ZipFile(partial, "w") as archive:

        def write(name: str, data: bytes | str) -> None:
            # A ZipInfo has no time of its own: the same tensors give the same bytes.
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)

        write("data.pkl", _pickle(arrays))
        write("byteorder", "little")
        for number, array in enumerate(arrays.values()):
            write(f"data/{number}", array.tobytes())
        write("version", "3\n")
    os.replace(partial, path)


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns the pickle of an OrderedDict of tensors, each in its own storage."""
    kinds = {dtype: kind.replace(".", "\n") for kind, dtype in DTYPES.items()}
    parts = [b"\x80\2ccollections\nOrderedDict\n)R("]
    for number, (name, array) in enumerate(arrays.items()):
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        parts += [
            _values(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + _values("storage"),
            f"c{kinds[array.dtype]}\n".encode() + _values(str(number), "cpu", array.size) + b"tQ",
            _values(0, array.shape, tuple(strides)) + b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join(parts) + b"u."


def _values(*values: Any) -> bytes:
    """Returns the pickle instructions that push plain values, without PROTO and STOP."""
    return b"".join(pickle.dumps(value, 2)[2:-1] for value in values)
