"""Reads what checkpoints do not store from the files that are published beside them.

- config.json of Hugging Face: activation and heads;
- open_clip_config.json of open_clip: activation, heads, image normalisation;
- preprocessor_config.json of Hugging Face: image normalisation.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from xclip_jax.cli import InputError, read_json
from xclip_jax.models.config import PreprocessConfig

# The values that config.json may give to both towers, the default first.
_SETTINGS = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)}
# Settings of open_clip_config.json that change what the same weights compute, with the only
# supported values, which are open_clip's defaults.
_OPEN_CLIP = {
    "vision_cfg": {
        "pool_type": "tok",
        "pos_embed_type": "learnable",
        "no_ln_pre": False,
        "final_ln_after_pool": False,
        "global_average_pool": False,
        "attentional_pool": False,
        "input_patchnorm": False,
        "timm_model_name": None,
        "act_kwargs": {},
        "norm_kwargs": {},
    },
    "text_cfg": {
        "pool_type": "argmax",
        "proj_type": "linear",
        "no_causal_mask": False,
        "final_ln_after_pool": False,
        "embed_cls": False,
        "hf_model_name": None,
        "act_kwargs": {},
        "norm_kwargs": {},
    },
}
_HF_HEADS, _HF_WIDTH = {"vision": 12, "text": 8}, 768  # transformers' defaults


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a checkpoint, None where they are not stated."""

    activation: Literal["quick_gelu", "gelu"] | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    preprocess: PreprocessConfig | None = None
    vision_width: int | None = None  # of the image tower
    source: str = ""  # the file that states activation and heads, or what tells them


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file, or raises InputError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object")
    return value


def read_open_clip(folder: Path) -> Settings | None:
    """Reads open_clip_config.json, or returns None if there is none.

    Defaults are those of https://github.com/mlfoundations/open_clip, src/open_clip/model.py.
    """
    path = folder / "open_clip_config.json"
    if not path.exists():
        return None
    config = read_object(path)
    model = _section(path, config, "model_cfg") or config
    vision, text = (_section(path, model, f"{tower}_cfg") for tower in ("vision", "text"))
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    for name, value in (("vision_cfg.width", width), ("vision_cfg.head_width", head_width)):
        _check_positive(path, name, value)
    for tower, allowed in _OPEN_CLIP.items():
        for name, value in allowed.items():
            stated = _section(path, model, tower).get(name)
            _check(path, f"{tower}.{name}", stated, stated in (None, value), repr(value))
    if width % head_width:
        problem = f"vision_cfg.width {width} is not a multiple of head_width {head_width}"
        raise InputError(f"{path}: {problem}")
    heads = text.get("heads", 8)
    _check_positive(path, "text_cfg.heads", heads)
    quick = [model.get(name) or False for name in ("quick_gelu", "force_quick_gelu")]
    if not all(isinstance(value, bool) for value in quick):
        raise InputError(f"{path}: quick_gelu is {quick[0]!r:.99}, must be true or false")
    stated, preprocess = _section(path, config, "preprocess_cfg"), None
    if stated:
        names = {"mean": stated.get("mean"), "std": stated.get("std")}
        preprocess = _preprocess(path, names)
        for name, value in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
            actual = stated.get(name, value)
            _check(path, f"preprocess_cfg.{name}", actual, actual == value, value)
    activation = "quick_gelu" if any(quick) else "gelu"
    layers = vision.get("layers", 12)
    _check(path, "vision_cfg.layers", layers, type(layers) is int, "one number, of a ViT")
    return Settings(activation, width // head_width, heads, preprocess, width, path.name)


def read_hugging_face(folder: Path) -> Settings:
    """Reads config.json of a CLIPModel, and preprocessor_config.json if there is one.

    Raises InputError if config.json is missing, malformed or of another model.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{folder} holds no config.json and is not a Hugging Face model")
    config = read_object(path)
    if (kind := config.get("model_type")) != "clip":
        raise InputError(f"{path}: model_type is {kind!r:.99}, must be 'clip'")
    vision, text = (_tower(path, config, tower) for tower in ("vision", "text"))
    for name, allowed in _SETTINGS.items():
        values = vision.get(name, allowed[0]), text.get(name, allowed[0])
        if values[0] != values[1] or values[0] not in allowed:
            actual = f"{values[0]!r:.99} (vision) and {values[1]!r:.99} (text)"
            needed = " or ".join(map(str, allowed))
            raise InputError(f"{path}: {name} is {actual}; must be {needed} in both")
    heads = []
    for tower, values in (("vision", vision), ("text", text)):
        count = values.get("num_attention_heads", _HF_HEADS[tower])
        if type(count) is not int or count < 1:
            wrong = f"num_attention_heads ({tower}) is {count!r:.99}"
            raise InputError(f"{path}: {wrong}, must be a whole number of at least 1")
        heads.append(count)
    activation = text.get("hidden_act", _SETTINGS["hidden_act"][0])
    width = vision.get("hidden_size", _HF_WIDTH)
    _check_positive(path, "vision_config.hidden_size", width)
    preprocess = _read_preprocessor(folder)
    return Settings(activation, heads[0], heads[1], preprocess, width, path.name)


def _tower(path: Path, config: dict[str, Any], tower: str) -> dict[str, Any]:
    """Returns the settings of a tower.

    transformers fills an old `*_config_dict` up with defaults and lets it win over `*_config`.
    """
    values = _section(path, config, f"{tower}_config")
    if not (old := _section(path, config, f"{tower}_config_dict")):
        return values
    defaults = {name: allowed[0] for name, allowed in _SETTINGS.items()}
    return values | defaults | {"num_attention_heads": _HF_HEADS[tower]} | old


def _read_preprocessor(folder: Path) -> PreprocessConfig | None:
    """Reads the image normalisation of preprocessor_config.json, None if there is none."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return None
    config = read_object(path)
    size = config.get("size", 224)
    side = size.get("shortest_edge") if isinstance(size, dict) else size
    _check(path, "size", size, type(side) is int, "the shortest edge")
    crop = config.get("crop_size", side)
    _check(path, "crop_size", crop, crop in (side, {"height": side, "width": side}), f"{side}")
    for name in ("do_resize", "do_center_crop", "do_rescale"):
        _check(path, name, config.get(name, True), config.get(name, True) is True, "true")
    flip = config.get("do_flip_channel_order", False)
    _check(path, "do_flip_channel_order", flip, not flip, "false")
    factor = config.get("rescale_factor", 1 / 255)
    is_usual = _is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-3)
    _check(path, "rescale_factor", factor, is_usual, "1/255")
    resample = config.get("resample", 3)  # a filter of Pillow
    _check(path, "resample", resample, resample == 3, "3, bicubic")
    if config.get("do_normalize") is False:
        return _preprocess(path, {"mean": [0.0] * 3, "std": [1.0] * 3})
    return _preprocess(path, {"mean": config.get("image_mean"), "std": config.get("image_std")})


def _preprocess(path: Path, values: dict[str, Any]) -> PreprocessConfig:
    """Returns a PreprocessConfig of mean and std, of which None is CLIP's."""
    numbers = {}
    for name, value in values.items():
        if value is None:
            continue
        is_list = isinstance(value, list) and len(value) == 3
        if not is_list or not all(map(_is_number, value)) or not is_rgb(value, name):
            rule = "three numbers above 0, at most 1" if name == "std" else "three numbers, 0 to 1"
            raise InputError(f"{path}: {name} is {value!r:.99}: must be {rule}")
        numbers[name] = tuple(map(float, value))
    return PreprocessConfig(**numbers)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_rgb(values: Sequence[float], name: str) -> bool:
    """Returns True if values may be the mean or deviation (`name`: "mean", "std") of pixels."""
    return min(values) >= 0 and max(values) <= 1 and not (name == "std" and 0 in values)


def _check(path: Path, name: str, value: Any, is_supported: bool, supported: str) -> None:
    if not is_supported:
        raise InputError(f"{path}: {name} is {value!r:.99}, supported is {supported}")


def _check_positive(path: Path, name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= 2**16:
        raise InputError(f"{path}: {name} is {value!r:.99}, must be a whole number from 1 to 65536")


def _section(path: Path, config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} must be an object")
    return value
