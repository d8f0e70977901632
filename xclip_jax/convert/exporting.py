"""A model directory -> what PyTorch users read."""

import json
from pathlib import Path

from safetensors.numpy import load_file, save_file

from xclip_jax.checkpoint import UNREAD_FILE, load_model, model_folder, partial_folder
from xclip_jax.convert.huggingface import clip_config, from_official
from xclip_jax.convert.mapping import to_tensors
from xclip_jax.convert.torch_archive import write_archive


def export(directory, output):
    """Writes `output`/pytorch_model.bin, an official state dict, and `output`/clip, the CLIP towers
    as transformers' CLIPModel reads them; whole or not at all.

    A model that the official code does not have (preset paper) gives its towers alone.

    Raises:
        InputError: `directory` holds no model.
    """
    directory, output = model_folder(directory), Path(output)
    architecture, model, params, tokenizer = load_model(directory)
    partial = partial_folder(output)
    (partial / "clip").mkdir()
    towers = to_tensors({"clip": params["clip"]})
    foreign = official_reason(architecture)
    if foreign is None:
        unread = directory / UNREAD_FILE
        kept = load_file(unread) if unread.is_file() else {}
        write_archive(partial / "pytorch_model.bin", to_tensors(params) | kept)
    save_file(from_official(towers), partial / "clip" / "model.safetensors", {"format": "pt"})
    end = architecture["text"]["vocab_size"] - 1 if tokenizer is None else tokenizer.end
    start = end - 1 if tokenizer is None else tokenizer.start
    config = clip_config(architecture, model.activation, start, end)
    (partial / "clip" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(partial / "clip")
    partial.rename(output)
    print(f"{output / 'clip'}: the CLIP towers, for transformers.CLIPModel.from_pretrained")
    if foreign is None:
        print(f"{output / 'pytorch_model.bin'}: official state dict, for torch.load")
    else:
        print(f"no official state dict: the official code has no model with {foreign}")


def official_reason(architecture):
    """What of a model the official X-CLIP and CLIP4Clip do not have; None if nothing."""
    a = architecture
    official = {"frame_features": "clip", "words": "all_tokens", "padding": "competes"}
    official |= {"matrices": "learned", "fusion": "mean", "aggregation": "attention"}
    if a["head"] != "xclip":
        official = {}
    for field, value in official.items():
        if a[field] != value:
            return f"model.{field} = {a[field]}"
    if a["head"] == "xclip" and len(a["granularities"]) < 4:
        return f"model.granularities = {', '.join(a['granularities'])}"
    if a["temporal"]["type"] != "none" and a["temporal"]["residual"] != "yes":
        return "model.temporal.residual = no"
    return _other_constants(a)


def _other_constants(a):
    """What the official code has as constants, and its checkpoints therefore do not tell."""
    towers = {"vision": a["vision"]["width"], "text": a["text"]["width"]}
    if a["temporal"]["type"] == "transformer" or a["head"] == "tight_transformer":
        towers["temporal"] = a["embed_dim"]
    for name, width in towers.items():
        if a[name]["heads"] != max(1, width // 64):
            return f"model.{name}.heads = {a[name]['heads']} (it has width / 64)"
    if a["activation"] != "quick_gelu":
        return f"model.activation = {a['activation']}"
    if a["head"] == "xclip" and a["tau"] != 0.01:
        return f"model.tau = {a['tau']}"
    return None
