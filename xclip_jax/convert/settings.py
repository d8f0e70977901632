"""Reads what checkpoints do not store from the files that are published beside them.

- config.json of Hugging Face: activation and heads;
- open_clip_config.json of open_clip: activation, heads, image normalisation;
- preprocessor_config.json of Hugging Face: image normalisation.
"""

import dataclasses
import math
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
        "act_kwargs": {},
        "norm_kwargs": {},
    },
    "text_cfg": {
        "pool_type": "argmax",
        "proj_type": "linear",
        "no_causal_mask": False,
        "final_ln_after_pool": False,
        "embed_cls": False,
        "act_kwargs": {},
        "norm_kwargs": {},
    },
}
_HF_HEADS = {"vision": 12, "text": 8}  # transformers' defaults


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a checkpoint, None where they are not stated."""

    activation: Literal["quick_gelu", "gelu"] | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    preprocess: PreprocessConfig | None = None
    source: str = ""  # the file that states activation and heads


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file, or raises InputError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object, is {type(value).__name__}")
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
            if (stated := (model.get(tower) or {}).get(name)) not in (None, value):
                problem = f"{tower}.{name} is {stated!r:.99}"
                raise InputError(f"{path}: {problem}, supported is {value!r}")
    heads = text.get("heads", 8)
    _check_positive(path, "text_cfg.heads", heads)
    activation = "quick_gelu" if model.get("quick_gelu") is True else "gelu"
    stated = _section(path, config, "preprocess_cfg")
    preprocess = PreprocessConfig()
    if stated:
        names = {"mean": stated.get("mean"), "std": stated.get("std")}
        preprocess = _preprocess(path, names)
        _check_resize(path, stated.get("resize_mode", "shortest"), "shortest")
        _check_resize(path, stated.get("interpolation", "bicubic"), "bicubic")
    heads_of_images = max(1, width // head_width)
    return Settings(activation, heads_of_images, heads, preprocess, path.name)


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
            wrong = f"the number of {tower}_heads is {count!r:.99}"
            raise InputError(f"{path}: {wrong}, must be at least 1")
        heads.append(count)
    activation = text.get("hidden_act", _SETTINGS["hidden_act"][0])
    return Settings(activation, heads[0], heads[1], _read_preprocessor(folder), path.name)


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
    if config.get("do_normalize") is False:
        return _preprocess(path, {"mean": [0.0] * 3, "std": [1.0] * 3})
    size = config.get("size", 224)
    is_crop = not isinstance(size, dict) or "shortest_edge" in size
    _check_resize(path, "crop" if is_crop else f"size {size!r:.99}", "crop")
    for name in ("do_resize", "do_center_crop", "do_rescale"):
        _check_resize(path, f"{name} {config.get(name, True)}", f"{name} True")
    factor = config.get("rescale_factor", 1 / 255)
    if not _is_number(factor) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise InputError(f"{path}: rescale_factor is {factor!r:.99}, supported is 1/255")
    _check_resize(path, config.get("resample", 3), 3)  # Pillow's bicubic
    return _preprocess(path, {"mean": config.get("image_mean"), "std": config.get("image_std")})


def _preprocess(path: Path, values: dict[str, Any]) -> PreprocessConfig:
    """Returns a PreprocessConfig of mean and std, of which None is CLIP's."""
    numbers = {}
    for name, value in values.items():
        if value is None:
            continue
        is_list = isinstance(value, list) and len(value) == 3
        if not is_list or not all(map(_is_number, value)) or (name == "std" and min(value) <= 0):
            rule = "must be three numbers" + (" above 0" if name == "std" else "")
            raise InputError(f"{path}: {name} is {value!r:.99}: {rule}")
        numbers[name] = tuple(map(float, value))
    return PreprocessConfig(**numbers)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_resize(path: Path, value: Any, allowed: Any) -> None:
    if value != allowed:
        problem = f"preprocesses images with {value!r:.99}"
        raise InputError(f"{path}: {problem}, supported is bicubic resizing with a centre crop")


def _check_positive(path: Path, name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= 2**16:
        raise InputError(f"{path}: {name} is {value!r:.99}, must be from 1 to 65536")


def _section(path: Path, config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} must be an object")
    return value
