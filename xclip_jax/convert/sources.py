"""Reads checkpoints of any supported kind under official names, without PyTorch."""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.numpy import load_file

from xclip_jax.cli import InputError
from xclip_jax.convert.mapping import from_hugging_face
from xclip_jax.convert.torch_archive import read_archive

HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
HUB_FILES += ["tokenizer*.json", "vocab.json", "merges.txt", "*_tokens*.json"]


@dataclasses.dataclass
class Source:
    """A checkpoint as it was read, before its architecture is inferred.

    Attributes:
        kind: a description to print.
        official: True for X-CLIP and CLIP4Clip, False for plain CLIP.
        tensors: official name -> array.
        activation: `quick_gelu` or `gelu`; a default if `heads` is empty.
        heads: number of heads by tower, "vision" and "text"; empty if the source lacks them.
        tokenizer: folder that may hold a tokenizer.
    """

    kind: str
    official: bool
    tensors: dict[str, np.ndarray]
    activation: str = "quick_gelu"
    heads: dict[str, int] = dataclasses.field(default_factory=dict)
    tokenizer: Path | None = None


def read_source(path: str | Path) -> Source:
    """Reads a checkpoint file, a Hugging Face folder or a hub id.

    Raises:
        InputError: the checkpoint is missing, cannot be read or is of an unknown kind.
    """
    location = Path(path)
    if not str(path).strip():
        raise InputError("--input is empty")
    if location.is_dir():
        return _read_folder(location)
    if location.suffix == ".safetensors" and location.is_file():
        return _classify(_load_safetensors([location]), "safetensors file", nested=False)
    if location.is_file():
        archive = read_archive(location)
        kind = "TorchScript archive" if archive.torchscript else "PyTorch state dict"
        return _classify(archive.tensors, kind, nested=archive.nested)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):  # how the hub names models
        raise InputError(f"{path}: no such file or folder")
    return _read_folder(_download(str(path)))


def _classify(tensors: dict[str, np.ndarray], kind: str, *, nested: bool) -> Source:
    """Returns the Source of a single file: official, OpenAI's or open_clip's."""
    if "vision_model.embeddings.class_embedding" in tensors:
        raise InputError(
            "these are weights of a Hugging Face CLIP: pass the folder that also holds config.json"
        )
    if any(name.startswith(("visual.layer1.", "clip.visual.layer1.")) for name in tensors):
        raise InputError("CLIP with a ResNet image tower is not supported, only ViT")
    if "clip.visual.conv1.weight" in tensors:
        model = "X-CLIP" if "global_mat_weight" in tensors else "CLIP4Clip"
        return Source(f"official {model} {kind}", True, tensors)
    if "text.token_embedding.weight" in tensors:  # open_clip's CustomTextCLIP
        tensors = {name.removeprefix("text."): array for name, array in tensors.items()}
        nested = True
    if "visual.conv1.weight" not in tensors:
        names = ", ".join(list(tensors)[:3]) or "nothing"
        raise InputError(f"not a CLIP model: visual.conv1.weight is missing, found {names}")
    tensors = {f"clip.{name}": array for name, array in tensors.items()}
    if nested:
        return Source(f"open_clip {kind}", False, tensors, activation="gelu")
    return Source(f"CLIP {kind}", False, tensors)


def _read_folder(folder: Path) -> Source:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no config.json and is not a Hugging Face model") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise InputError(f"{path}: model_type is {kind!r}, must be 'clip'")
    towers = {name: config.get(f"{name}_config") or {} for name in ("vision", "text")}
    for name, tower in towers.items():
        if not isinstance(tower, dict):
            raise InputError(f"{path}: {name}_config must be an object")
    activation = _read_shared_field(path, towers, "hidden_act", ("quick_gelu", "gelu"))
    _read_shared_field(path, towers, "layer_norm_eps", (1e-5,))
    heads = {"vision": 12, "text": 8}  # transformers' defaults, which config.json omits
    heads = {name: towers[name].get("num_attention_heads", heads[name]) for name in heads}
    for name, count in heads.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(
                f"{path}: {name}_config.num_attention_heads is {count!r}, must be at least 1"
            )
    tensors = from_hugging_face(_read_weights(folder))
    return Source("Hugging Face CLIP", False, tensors, activation, heads, folder)


def _read_shared_field(path: Path, towers: dict[str, dict], field: str, allowed: tuple) -> Any:
    """Returns the value of a field that both towers share, by default the first allowed one."""
    values = {name: tower.get(field, allowed[0]) for name, tower in towers.items()}
    if values["vision"] != values["text"] or values["text"] not in allowed:
        raise InputError(
            f"{path}: {field} is {values['vision']!r} (vision) and "
            f"{values['text']!r} (text); must be {' or '.join(map(str, allowed))} in both"
        )
    return values["text"]


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    for stem, load in (("model.safetensors", _load_safetensors), ("pytorch_model.bin", _load_bins)):
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            return load([folder / stem])
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                shards = [folder / Path(name).name for name in sorted(names)]
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                raise InputError(f"{index}: not a valid index of shards") from None
            return load(shards)
    raise InputError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _load_bins(paths: list[Path]) -> dict[str, np.ndarray]:
    return _merge((path, read_archive(path).tensors) for path in paths)


def _load_safetensors(paths: list[Path]) -> dict[str, np.ndarray]:
    def load(path: Path) -> dict[str, np.ndarray]:
        if not path.is_file():
            raise InputError(f"{path} is missing")
        try:
            return load_file(path)
        except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise InputError(f"{path}: not a complete safetensors file: {error}") from None

    return _merge((path, load(path)) for path in paths)


def _merge(shards: Iterable[tuple[Path, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    tensors = {}
    for path, shard in shards:
        if repeated := tensors.keys() & shard.keys():
            raise InputError(
                f"{path}: these tensors are also in another shard: {', '.join(sorted(repeated))}"
            )
        tensors |= shard
    return tensors


def _download(hub_id: str) -> Path:
    """Returns the folder of a hub repository, downloaded unless cached."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # many types, from no network to no such repository
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{hub_id}: no such file or folder, and not available from the Hugging Face hub "
            f"({reason}). Download config.json, model.safetensors and the tokenizer's files from "
            f"https://huggingface.co/{hub_id} into a folder and pass that"
        ) from None
