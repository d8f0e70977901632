"""Reads config.json and preprocessor_config.json of Hugging Face: CLIP, SigLIP, a half of them."""

import math
import re
from pathlib import Path
from typing import Any

from xclip_jax.cli import InputError
from xclip_jax.convert.settings import (
    Settings,
    check_positive,
    check_value,
    is_number,
    make_preprocess,
    read_object,
    read_sizes,
    section_of,
)
from xclip_jax.models.config import PreprocessConfig
from xclip_jax.models.families import SIGLIP, SIGLIP_PREPROCESS

_SIZES = {"layers": "num_hidden_layers", "width": "hidden_size"}
_VISION = {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT = {"context_length": "max_position_embeddings", "vocab_size": "vocab_size"}
_TOWERS = {"vision": "vision_config", "text": "text_config"}
_KINDS = {  # model_type -> (family, towers)
    **{"clip": ("clip", "both"), "siglip": ("siglip", "both")},
    **{"clip_vision_model": ("clip", "vision"), "clip_text_model": ("clip", "text")},
    **{"siglip_vision_model": ("siglip", "vision"), "siglip_text_model": ("siglip", "text")},
}
_DEFAULTS = {  # transformers': (vision, text)
    "clip": {"num_attention_heads": (12, 8), "hidden_size": (768, 512)},
    "siglip": {"num_attention_heads": (12, 12), "hidden_size": (768, 768)},
}
# The values that config.json may give to both towers, the default first.
_VALUES = {
    "clip": {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)},
    "siglip": {"hidden_act": ("gelu_pytorch_tanh", "gelu"), "layer_norm_eps": (1e-6,)},
}
_FILTERS = {2: "bilinear", 3: "bicubic"}  # of Pillow


def read_hugging_face(folder: Path) -> Settings:
    """Reads config.json of a CLIPModel, a SiglipModel or a half of them.

    Also preprocessor_config.json if there is one. Raises InputError if config.json is missing,
    malformed or of another model.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{folder} holds no config.json and is not a Hugging Face model")
    config = read_object(path)
    kind = config.get("model_type")
    if kind == "siglip2":
        problem = "model_type 'siglip2' is SigLIP 2 with images of any shape (NaFlex)"
        advice = "take a model of fixed size, such as google/siglip2-base-patch16-224"
        raise InputError(f"{path}: {problem}, which is not supported: {advice}")
    if kind not in _KINDS:
        needed = "'clip' or 'siglip', or of a half, such as 'clip_text_model'"
        raise InputError(f"{path}: model_type is {kind!r:.99}, must be {needed}")
    family, towers = _KINDS[kind]
    halves = [name for name in _TOWERS if towers in ("both", name)]
    whole = {tower: _tower(path, config, tower, family) for tower in halves}
    if towers != "both":
        whole = {towers: config}
    fields = _hf_fields(path, whole, family) | {"towers": towers}
    sizes = {}
    for tower, section in whole.items():
        names = _SIZES | (_VISION if tower == "vision" else _TEXT)
        sizes |= read_sizes(section, {f"{tower}.{field}": name for field, name in names.items()})
    vision, side = whole.get("vision", {}), sizes.get("vision.image_size", 224)
    preprocess = _read_preprocessor(folder, family, side) if "vision" in whole else None
    head = vision.get("vision_use_head", True)
    check_value(path, "vision_use_head", head, head is True, "true")
    if family == "siglip":
        preprocess = preprocess or PreprocessConfig(**SIGLIP_PREPROCESS)
    width = vision.get("hidden_size", _DEFAULTS[family]["hidden_size"][0])
    check_positive(path, "vision_config.hidden_size", width)
    return Settings(fields, sizes, preprocess, width if vision else None, path.name)


def _hf_fields(path: Path, towers: dict[str, dict[str, Any]], family: str) -> dict[str, Any]:
    """Returns the fields of ModelConfig that the sections of the towers state."""
    for name, allowed in _VALUES[family].items():
        values = [section.get(name, allowed[0]) for section in towers.values()]
        differs = any(value != values[0] for value in values) and family == "clip"
        if differs or any(value not in allowed for value in values):
            pairs = zip(values, towers, strict=True)
            actual = " and ".join(f"{value!r:.99} ({tower})" for value, tower in pairs)
            needed = " or ".join(map(str, allowed))
            raise InputError(f"{path}: {name} is {actual}; must be {needed} in both")
    fields, activations = dict(SIGLIP if family == "siglip" else {}), {}
    for tower, section in towers.items():
        default = _DEFAULTS[family]["num_attention_heads"][tower == "text"]
        count = section.get("num_attention_heads", default)
        if type(count) is not int or count < 1:
            wrong = f"num_attention_heads ({tower}) is {count!r:.99}"
            raise InputError(f"{path}: {wrong}, must be a whole number of at least 1")
        fields[f"{tower}.heads"] = count
        activation = section.get("hidden_act", _VALUES[family]["hidden_act"][0])
        activations[tower] = activation.replace("gelu_pytorch_tanh", "gelu_tanh")
    fields["activation"] = activations.get("text", activations.get("vision"))
    if activations.get("vision", fields["activation"]) != fields["activation"]:
        fields["vision.activation"] = activations["vision"]
    if "text" in towers and family == "clip":
        end = towers["text"].get("eos_token_id", 49407)
        check_value(path, "eos_token_id", end, type(end) is int and end >= 0, "a token id")
        # 2 is what old files state wrongly: transformers then takes the largest id.
        fields |= {} if end == 2 else {"text.pool": "end", "text.end_id": end}
    return fields


def _tower(path: Path, config: dict[str, Any], tower: str, family: str) -> dict[str, Any]:
    """Returns the settings of a tower.

    transformers fills an old `*_config_dict` up with defaults and lets it win over `*_config`.
    """
    values = section_of(path, config, f"{tower}_config")
    if not (old := section_of(path, config, f"{tower}_config_dict")):
        return values
    defaults = {name: allowed[0] for name, allowed in _VALUES[family].items()}
    heads = _DEFAULTS[family]["num_attention_heads"][tower == "text"]
    return values | defaults | {"num_attention_heads": heads} | old


def _read_preprocessor(folder: Path, family: str, side: Any) -> PreprocessConfig | None:
    """Reads preprocessor_config.json, or returns None if there is none.

    What it does not state is as in transformers' image processor of the family. Its images must
    have the `side` that config.json states, as transformers takes no others.
    """
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return None
    config = read_object(path)
    kind = config.get("image_processor_type", "CLIP")
    known = isinstance(kind, str) and re.match(r"CLIP|Siglip(?!2)", kind) is not None
    check_value(path, "image_processor_type", kind, known, "that of CLIP or of SigLIP")
    for name in ("do_pad", "max_num_patches"):
        check_value(path, name, config.get(name), not config.get(name), "its absence")
    square = {"height": 224, "width": 224}
    resize, made = _read_resize(path, {"size": square if family == "siglip" else 224} | config)
    if made != side and "size" in config:
        raise InputError(f"{path}: size is {made}, but config.json has image_size {side!r:.99}")
    for name in ("do_resize", "do_rescale"):
        check_value(path, name, config.get(name, True), config.get(name, True) is True, "true")
    flip = config.get("do_flip_channel_order", False)
    check_value(path, "do_flip_channel_order", flip, not flip, "false")
    factor = config.get("rescale_factor", 1 / 255)
    is_usual = is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-3)
    check_value(path, "rescale_factor", factor, is_usual, "1/255")
    resample = config.get("resample", 3)
    known = type(resample) is int and resample in _FILTERS
    check_value(path, "resample", resample, known, "2, bilinear, or 3, bicubic")
    half = [0.5] * 3 if family == "siglip" else None
    rgb = {"mean": config.get("image_mean", half), "std": config.get("image_std", half)}
    if config.get("do_normalize") is False:
        rgb = {"mean": [0.0] * 3, "std": [1.0] * 3}
    return make_preprocess(path, rgb, resize=resize, interpolation=_FILTERS[resample])


def _read_resize(path: Path, config: dict[str, Any]) -> tuple[str, Any]:
    """Returns (resize of PreprocessConfig, side in pixels) of preprocessor_config.json."""
    size, crops = config["size"], config.get("do_center_crop")
    if isinstance(size, dict) and "height" in size and not crops:
        side = size["height"]
        is_square = side == size.get("width") and type(side) is int
        check_value(path, "size", size, is_square, "a square or the shortest edge")
        return "squash", side
    side = size.get("shortest_edge") if isinstance(size, dict) else size
    check_value(path, "size", size, type(side) is int, "the shortest edge")
    crop = config.get("crop_size", side)
    same = crop in (side, {"height": side, "width": side})
    check_value(path, "crop_size", crop, same, f"{side}")
    check_value(path, "do_center_crop", crops, crops in (True, None), "true")
    return "crop", side
