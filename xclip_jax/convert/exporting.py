"""Exports a model directory to the files that PyTorch programs read."""

import json
import operator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from xclip_jax.checkpoint import UNREAD_FILE, load_model, model_folder, partial_folder
from xclip_jax.convert.mapping import to_hugging_face, to_tensors
from xclip_jax.convert.torch_archive import write_archive
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
    folder = partial / "clip"
    folder.mkdir()
    unsupported = unsupported_feature(model.config)
    if unsupported is None:
        unread = directory / UNREAD_FILE
        extra = load_file(unread) if unread.is_file() else {}
        write_archive(partial / "pytorch_model.bin", to_tensors(params) | extra)
    towers = to_hugging_face(to_tensors({"clip": params["clip"]}))
    save_file(towers, folder / "model.safetensors", {"format": "pt"})
    end = model.config.text.vocab_size - 1
    special = (end - 1, end) if tokenizer is None else (tokenizer.start, tokenizer.end)
    config = clip_config(model.config, *special)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)
    partial.rename(output)
    print(f"{output / 'clip'}: the CLIP towers, for transformers.CLIPModel.from_pretrained")
    state = f"{output / 'pytorch_model.bin'}: official state dict, for torch.load"
    missing = f"no official state dict: the official code does not support {unsupported}"
    print(missing if unsupported else state)


def unsupported_feature(config: ModelConfig) -> str | None:
    """Returns the first feature the official X-CLIP and CLIP4Clip do not support, or None."""
    # Constants of the official code, which its checkpoints do not store.
    official = {"activation": "quick_gelu", "vision.heads": max(1, config.vision.width // 64)}
    official["logit_bias"] = False
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
    for field, needed in official.items():
        value = operator.attrgetter(field)(config)
        if value != needed:
            return f"model.{field} = {value} (must be {needed})"
    return None


def clip_config(config: ModelConfig, start: int, end: int) -> dict[str, Any]:
    """Returns the config.json of a `CLIPModel` with `start` and `end` as token ids."""

    def tower(kind: str, sizes: VisionConfig | TextConfig) -> dict[str, Any]:
        return {
            "model_type": f"clip_{kind}_model",
            "hidden_size": sizes.width,
            "intermediate_size": 4 * sizes.width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "hidden_act": config.activation,
            "projection_dim": config.embed_dim,
            "layer_norm_eps": 1e-5,
        }

    vision, text = tower("vision", config.vision), tower("text", config.text)
    vision |= {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size}
    text |= {"vocab_size": config.text.vocab_size, "bos_token_id": start, "eos_token_id": end}
    text["max_position_embeddings"] = config.text.context_length
    towers = {"vision_config": vision, "text_config": text, "projection_dim": config.embed_dim}
    return {"architectures": ["CLIPModel"], "model_type": "clip"} | towers
