"""Recognises a checkpoint and reads it into official names, without torch."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.numpy import load_file

from xclip_jax.cli import InputError
from xclip_jax.convert import huggingface
from xclip_jax.convert.torch_archive import read_archive

HUB_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", *(
    "tokenizer*.json", "vocab.json", "merges.txt", "*_tokens*.json",
))  # fmt: skip


@dataclasses.dataclass
class Source:
    """A checkpoint as read: what is in the file, nothing inferred from shapes yet."""

    kind: str  # for people
    official: bool  # of X-CLIP or CLIP4Clip; else plain CLIP
    tensors: dict[str, np.ndarray]  # official names
    activation: str  # quick_gelu | gelu; a guess where heads is empty
    heads: dict[str, int]  # of "vision" and "text"; empty where the source tells neither
    tokenizer: Path | None  # a folder that may hold one


def read_source(path):
    """The checkpoint at a path: file, Hugging Face folder, or hub id.

    Raises:
        InputError: nothing is there, or nothing that is known.
    """
    location = Path(path)
    if not str(path).strip():
        raise InputError("--input is empty")
    if location.is_dir():
        return _read_folder(location)
    if location.suffix == ".safetensors" and location.is_file():
        return _of_tensors(_load_safetensors([location]), "safetensors file", False)
    if location.is_file():
        archive = read_archive(location)
        return _of_tensors(archive.tensors, "PyTorch state dict", archive.nested, archive)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):  # how the hub names models
        raise InputError(f"{path}: no such file or folder")
    return _read_folder(_download(str(path)))


def _of_tensors(tensors, kind, nested, archive=None):
    """A Source of names as in a file: official, plain CLIP's, open_clip's or Hugging Face's."""
    if "vision_model.embeddings.class_embedding" in tensors:
        raise InputError(
            "these are weights of a Hugging Face CLIP: give the folder that also holds config.json"
        )
    if any(name.startswith(("visual.layer1.", "clip.visual.layer1.")) for name in tensors):
        raise InputError("this is a CLIP with a ResNet image tower; only ViT ones are supported")
    if "clip.visual.conv1.weight" in tensors:
        named = "CLIP4Clip" if "global_mat_weight" not in tensors else "X-CLIP"
        return Source(f"official {named} {kind}", True, tensors, "quick_gelu", {}, None)
    if "text.token_embedding.weight" in tensors:  # open_clip's CustomTextCLIP
        tensors = {name.removeprefix("text."): array for name, array in tensors.items()}
        nested = True
    if "visual.conv1.weight" not in tensors:
        names = ", ".join(list(tensors)[:3]) or "nothing"
        raise InputError(f"no CLIP among the weights: expected visual.conv1.weight, found {names}")
    torchscript = archive is not None and archive.torchscript
    tensors = {f"clip.{name}": array for name, array in tensors.items()}
    if nested:
        return Source(f"open_clip {kind}", False, tensors, "gelu", {}, None)
    kind = "OpenAI CLIP, TorchScript archive" if torchscript else f"CLIP {kind}"
    return Source(kind, False, tensors, "quick_gelu", {}, None)


def _read_folder(folder):
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no config.json: not a Hugging Face model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / 'config.json'}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise InputError(f"{folder / 'config.json'}: model_type is {kind!r}, must be 'clip'")
    path = folder / "config.json"
    towers = {name: config.get(f"{name}_config") or {} for name in ("vision", "text")}
    for name, tower in towers.items():
        if not isinstance(tower, dict):
            raise InputError(f"{path}: {name}_config must be an object")
    activation = _common(folder, towers, "hidden_act", "quick_gelu", ("quick_gelu", "gelu"))
    _common(folder, towers, "layer_norm_eps", 1e-5, (1e-5,))
    heads = {"vision": 12, "text": 8}  # the library's defaults, left out of config.json
    heads = {name: towers[name].get("num_attention_heads", heads[name]) for name in heads}
    for name, count in heads.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"{path}: {name}_config.num_attention_heads is {count!r}")
    tensors = huggingface.to_official(_read_weights(folder))
    return Source("Hugging Face CLIP", False, tensors, activation, heads, folder)


def _common(folder, towers, field, default, allowed):
    """The value that both towers share, one of those allowed."""
    values = {name: tower.get(field, default) for name, tower in towers.items()}
    if values["vision"] != values["text"] or values["text"] not in allowed:
        raise InputError(
            f"{folder / 'config.json'}: {field} is {values['vision']!r} (vision) and "
            f"{values['text']!r} (text); must be {' or '.join(map(str, allowed))} in both"
        )
    return values["text"]


def _read_weights(folder):
    for stem, load in (("model.safetensors", _load_safetensors), ("pytorch_model.bin", _load_bins)):
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            return load([folder / stem])
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError):
                raise InputError(f"{index}: not an index of shards") from None
            return load([folder / Path(name).name for name in sorted(names)])
    raise InputError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _load_bins(paths):
    return _merge((path, read_archive(path).tensors) for path in paths)


def _load_safetensors(paths):
    def load(path):
        if not path.is_file():
            raise InputError(f"{path} is missing")
        try:
            return load_file(path)
        except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise InputError(f"{path}: not a whole safetensors file: {error}") from None

    return _merge((path, load(path)) for path in paths)


def _merge(shards):
    tensors = {}
    for path, shard in shards:
        if twice := tensors.keys() & shard.keys():
            raise InputError(f"{path}: {', '.join(sorted(twice))} are in another shard too")
        tensors |= shard
    return tensors


def _download(hub_id):
    """The folder of a hub repository, downloaded unless cached."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # of many types, from no network to no such repository
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{hub_id}: no such file or folder, and not to be had from the Hugging Face hub "
            f"({reason}). Fetch config.json, model.safetensors and the tokenizer's files from "
            f"https://huggingface.co/{hub_id} into a folder and give that"
        ) from None
