"""Exports a model directory to the files that PyTorch programs read."""

import json
import operator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from xclip_jax.checkpoint import (
    UNREAD_FILE,
    describe_model,
    load_model,
    model_folder,
    partial_folder,
)
from xclip_jax.cli import InputError
from xclip_jax.convert.layouts import join_pool, to_hugging_face
from xclip_jax.convert.mapping import to_tensors
from xclip_jax.convert.torch_archive import write_archive
from xclip_jax.data.pieces import PieceTokenizer
from xclip_jax.data.tokenizer import Tokenizer
from xclip_jax.models.config import BlockConfig, ModelConfig
from xclip_jax.models.families import SIGLIP

_LARGEST = 2  # as eos_token_id: transformers takes the largest id, as OpenAI's code does
_FILTERS = {"bilinear": 2, "bicubic": 3}  # of Pillow
# Fields of encoders that transformers' CLIPModel and SiglipModel have as constants.
_CLIP = {
    **{"vision.class_token": True, "vision.patch_bias": False, "vision.pre_norm": True},
    **{"vision.pool": "class_token", "vision.projection": "linear", "text.projection": "linear"},
    **{"text.causal": True, "text.start_token": True},
}
_SIGLIP = {
    **{"vision.class_token": False, "vision.patch_bias": True, "vision.pre_norm": False},
    **{"vision.pool": "attention", "vision.projection": "none", "text.projection": "bias"},
    **{"vision.pool_heads": 0, "vision.pool_mlp_width": 0},
    **{name: SIGLIP[name] for name in ("text.causal", "text.pool", "text.start_token")},
}
_BOTH = {
    "vision.rotary": "none",
    "vision.num_frames": 0,
    "text.end_token": True,
    **{f"{tower}.logit_cap": 0.0 for tower in ("vision", "text")},
    **{
        f"{tower}.{name}": False
        for tower in ("vision", "text")
        for name in ("gated", "inner_norms")
    },
}


def export(directory: str | Path, output: str | Path) -> None:
    """Writes a model as an official state dict and as a Hugging Face folder, atomically.

    The state dict is `output`/pytorch_model.bin, the encoders are `output`/clip or `output`/siglip.
    A model that the official code does not support (preset paper) is exported as its encoders only.

    Raises:
        InputError: `directory` holds no model, or neither can be exported.
    """
    directory, output = model_folder(directory), Path(output)
    _, model, params, tokenizer = load_model(directory)
    config = model.config
    family, problem = hugging_face_family(config)
    unsupported = unsupported_feature(config)
    if problem and unsupported:
        raise InputError(f"{directory}: transformers has no model with {problem}")
    partial = partial_folder(output)
    if unsupported is None:
        unread = directory / UNREAD_FILE
        extra = load_file(unread) if unread.is_file() else {}
        write_archive(partial / "pytorch_model.bin", to_tensors(params) | extra)
    if not problem:
        encoders = {"clip": params["clip"]}
        if family == "siglip":
            # The default loss has no bias, and one changes no ranking.
            encoders["logit_bias"] = params.get("logit_bias", np.float32(0))
        tensors = to_hugging_face(to_tensors(encoders), siglip=family == "siglip")
        _write_hugging_face(partial / family, config, tensors, tokenizer)
    partial.rename(output)
    if not problem:
        name = {"clip": "CLIPModel", "siglip": "SiglipModel"}[family]
        print(f"{output / family}: the encoders, for transformers.{name}.from_pretrained")
    if isinstance(tokenizer, PieceTokenizer) and tokenizer.clean == "canonicalize":
        rule = "lower-case texts and remove their punctuation first, as open_clip does"
        print(f"note: transformers' tokenizer keeps punctuation: {rule}")
    state = f"{output / 'pytorch_model.bin'}: official state dict, for torch.load"
    missing = f"no official state dict: X-CLIP's and CLIP4Clip's code has no {unsupported}"
    print(missing if unsupported else state)


def export_safetensors(directory: str | Path, output: str | Path) -> None:
    """Writes any model as model.safetensors, model.json and the tokenizer, atomically.

    The names of its tensors are described in docs/pytorch.md. examples/xclip_torch.py reads it.

    Raises:
        InputError: `directory` holds no model.
    """
    output = Path(output)
    _, model, params, tokenizer = load_model(model_folder(directory))
    tensors = join_pool(to_tensors(params))
    partial = partial_folder(output)
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    _write_json(partial / "model.json", describe_model(model.config))
    if tokenizer is not None:
        _write_tokenizer(tokenizer, partial / "tokenizer")
    partial.rename(output)
    print(f"{output}: {len(tensors)} tensors, for XClip.load of examples/xclip_torch.py")


def _write_hugging_face(
    folder: Path, config: ModelConfig, tensors: dict[str, Any], tokenizer: Any
) -> None:
    """Writes weights, config.json, preprocessor_config.json and the tokenizer of an encoder."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    siglip = folder.name == "siglip"
    end = config.text.vocab_size - 1
    special = (end - 1, _LARGEST) if tokenizer is None else (tokenizer.start, tokenizer.end)
    described = siglip_config(config) if siglip else clip_config(config, *special)
    _write_json(folder / "config.json", described)
    _write_json(folder / "preprocessor_config.json", preprocessor_config(config, siglip=siglip))
    if tokenizer is not None:
        _write_tokenizer(tokenizer, folder)


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer for transformers' AutoTokenizer."""
    tokenizer.save(folder)
    if isinstance(tokenizer, PieceTokenizer):
        names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
        options = {"model_max_length": tokenizer.max_words, "padding_side": "right"}
        options |= {"add_bos_token": False, "add_eos_token": True}
        described = {"tokenizer_class": "Siglip2Tokenizer"} | names | options
        _write_json(folder / "tokenizer_config.json", described)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _first_difference(config: ModelConfig, needed: dict[str, Any]) -> str | None:
    """Returns the first field with another value than needed, None if there is none."""
    if config.text.pool == "class_token":
        return "model.text.pool = class_token"
    for field, value in needed.items():
        if (actual := operator.attrgetter(field)(config)) != value:
            return f"model.{field} = {actual} (must be {value})"
    return None


def hugging_face_family(config: ModelConfig) -> tuple[str, str | None]:
    """Returns "clip" or "siglip", and the first feature that this family of transformers lacks."""
    family = "siglip" if config.vision.pool == "attention" else "clip"
    constants = {"towers": "both", **_BOTH, **(_SIGLIP if family == "siglip" else _CLIP)}
    return family, _first_difference(config, constants)


def unsupported_feature(config: ModelConfig) -> str | None:
    """Returns the first feature the official X-CLIP and CLIP4Clip do not support, or None."""
    # Constants of the official code, which its checkpoints do not store.
    official = {"activation": "quick_gelu", "vision.heads": max(1, config.vision.width // 64)}
    official |= {"towers": "both", "logit_bias": False, **_BOTH, **_CLIP}
    official |= {f"{tower}.mlp_width": 0 for tower in ("vision", "text")}
    official |= {f"{tower}.epsilon": 1e-5 for tower in ("vision", "text")}
    official["text.heads"] = max(1, config.text.width // 64)
    if config.temporal.type == "transformer" or config.head == "tight_transformer":
        official["temporal.heads"] = max(1, config.embed_dim // 64)
    if config.temporal.type != "none":
        official["temporal.residual"] = True
    if config.head == "xclip":
        official |= {"frame_features": "clip", "words": "all_tokens", "padding": "competes"}
        official |= {"matrices": True, "fusion": "mean", "aggregation": "attention", "tau": 0.01}
        official["tau_learned"] = False
        if len(config.granularities) < 4:
            return f"model.granularities = {', '.join(config.granularities)}"
    return _first_difference(config, official)


def _tower(kind: str, blocks: BlockConfig, family: str) -> dict[str, Any]:
    """Returns what config.json says of the blocks of a tower."""
    activation = (blocks.activation or "").replace("gelu_tanh", "gelu_pytorch_tanh")
    return {
        "model_type": f"{family}_{kind}_model",
        "hidden_size": blocks.width,
        "intermediate_size": blocks.mlp_width or 4 * blocks.width,
        "num_hidden_layers": blocks.layers,
        "num_attention_heads": blocks.heads,
        "hidden_act": activation,
        "layer_norm_eps": blocks.epsilon,
    }


def clip_config(config: ModelConfig, start: int, end: int) -> dict[str, Any]:
    """Returns the config.json of a `CLIPModel` with `start` and `end` as token ids."""
    vision, text = (_tower(kind, config.blocks(kind), "clip") for kind in ("vision", "text"))
    vision |= {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size}
    if config.text.pool == "end":
        end = config.text.end_id
    elif end != config.text.vocab_size - 1:
        end = _LARGEST
    text |= {"vocab_size": config.text.vocab_size, "bos_token_id": start, "eos_token_id": end}
    text["max_position_embeddings"] = config.text.context_length
    for tower in (vision, text):
        tower["projection_dim"] = config.embed_dim
    towers = {"vision_config": vision, "text_config": text, "projection_dim": config.embed_dim}
    return {"architectures": ["CLIPModel"], "model_type": "clip"} | towers


def siglip_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a `SiglipModel`."""
    vision, text = (_tower(kind, config.blocks(kind), "siglip") for kind in ("vision", "text"))
    vision |= {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size}
    text |= {"vocab_size": config.text.vocab_size, "projection_size": config.embed_dim}
    text["max_position_embeddings"] = config.text.context_length
    text |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}  # as in Gemma's vocabulary
    towers = {"vision_config": vision, "text_config": text}
    return {"architectures": ["SiglipModel"], "model_type": "siglip"} | towers


def preprocessor_config(config: ModelConfig, *, siglip: bool) -> dict[str, Any]:
    """Returns the preprocessor_config.json of a model."""
    p, side = config.preprocess, config.vision.image_size
    square = {"height": side, "width": side}
    squashes = p.resize == "squash"
    return {
        "image_processor_type": f"{'Siglip' if siglip else 'CLIP'}ImageProcessor",
        "do_resize": True,
        "size": square if squashes else {"shortest_edge": side},
        "resample": _FILTERS[p.interpolation],
        "do_center_crop": not squashes,
        **({} if squashes else {"crop_size": square}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
