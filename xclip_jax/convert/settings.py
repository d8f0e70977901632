"""Reads what checkpoints do not store from the files that are published beside them.

- config.json of Hugging Face: activation, heads, the end token;
- open_clip_config.json of open_clip: activation, heads, options of both towers, preprocessing;
- preprocessor_config.json of Hugging Face: preprocessing.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from xclip_jax.cli import InputError, read_json
from xclip_jax.models.config import PreprocessConfig
from xclip_jax.models.families import SIGLIP, SIGLIP_PREPROCESS, timm_tower

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
    "text_cfg": {"hf_model_name": None, "embed_cls": False, "final_ln_after_pool": False},
}
# Settings that are read below, that the weights tell, or that only training uses.
_COMMON = "width layers mlp_ratio act_kwargs norm_kwargs output_tokens"
_OPEN_CLIP_READ = {
    "vision_cfg": f"{_COMMON} head_width patch_size image_size patch_dropout timm_model_name "
    "timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path "
    "timm_model_kwargs".split(),
    "text_cfg": f"{_COMMON} heads context_length vocab_size hf_tokenizer_name tokenizer_kwargs "
    "no_causal_mask pool_type proj_type proj_bias pad_id".split(),
}
# Options of timm's towers that the weights or the fields of ModelConfig hold.
_TIMM_OPTIONS = ("img_size", "patch_size", "embed_dim", "depth", "mlp_ratio", "num_heads")
_TIMM_OPTIONS += ("ref_feat_shape", "class_token")
_VISION_SIZES = {f"vision.{n}": n for n in ("layers", "image_size", "patch_size")}
_TEXT_SIZES = {f"text.{n}": n for n in ("layers", "width", "context_length", "vocab_size")}
_HF_SIZES = {"layers": "num_hidden_layers", "width": "hidden_size"}
_HF_VISION = {"image_size": "image_size", "patch_size": "patch_size"}
_HF_TEXT = {"context_length": "max_position_embeddings", "vocab_size": "vocab_size"}
_HF_TOWERS = {"vision": "vision_config", "text": "text_config"}
_HF_KINDS = {  # model_type -> (family, towers)
    **{"clip": ("clip", "both"), "siglip": ("siglip", "both")},
    **{"clip_vision_model": ("clip", "vision"), "clip_text_model": ("clip", "text")},
    **{"siglip_vision_model": ("siglip", "vision"), "siglip_text_model": ("siglip", "text")},
}
_HF_DEFAULTS = {  # transformers': (vision, text)
    "clip": {"num_attention_heads": (12, 8), "hidden_size": (768, 512)},
    "siglip": {"num_attention_heads": (12, 12), "hidden_size": (768, 768)},
}
# The values that config.json may give to both towers, the default first.
_HF_VALUES = {
    "clip": {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)},
    "siglip": {"hidden_act": ("gelu_pytorch_tanh", "gelu"), "layer_norm_eps": (1e-6,)},
}
_FILTERS = {2: "bilinear", 3: "bicubic"}  # of Pillow


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a checkpoint that its weights do not store."""

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of ModelConfig, dotted
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # those that weights tell
    preprocess: PreprocessConfig | None = None
    vision_width: int | None = None  # of the image tower
    source: str = ""  # the file that states them, or what tells them
    clean: Literal["lower", "canonicalize"] | None = None  # of a SentencePiece tokenizer's texts


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
    if model.get("multimodal_cfg"):
        problem = "multimodal_cfg: a CoCa, which also writes captions"
        raise InputError(f"{path}: {problem}, is not supported")
    for group, allowed in _OPEN_CLIP.items():
        section = _section(path, model, group)
        for name, value in allowed.items():
            stated = section.get(name)
            _check(path, f"{group}.{name}", stated, stated in (None, value), repr(value))
        _refuse_unknown(path, group, section, {*allowed, *_OPEN_CLIP_READ[group]})
    quick = [model.get(name) or False for name in ("quick_gelu", "force_quick_gelu")]
    if not all(isinstance(value, bool) for value in quick):
        raise InputError(f"{path}: quick_gelu is {quick[0]!r:.99}, must be true or false")
    fields = {"activation": "quick_gelu" if any(quick) else "gelu"}
    if (name := vision.get("timm_model_name")) is not None:
        width, tower = None, _read_timm(path, name, vision)
    else:
        width, tower = _read_vit(path, vision)
    fields |= {"vision.activation": fields["activation"]} | tower | _read_text(path, text)
    if fields["vision.activation"] == fields["activation"]:
        del fields["vision.activation"]
    if any(quick) and text.get("act_kwargs"):
        raise InputError(f"{path}: quick_gelu and text_cfg.act_kwargs contradict each other")
    clean = _section(path, text, "tokenizer_kwargs").get("clean")
    known = clean in (None, "lower", "canonicalize")
    _check(path, "text_cfg.tokenizer_kwargs.clean", clean, known, "lower or canonicalize")
    preprocess = _read_transform(path, _section(path, config, "preprocess_cfg"))
    sizes = _read_sizes(model, {"embed_dim": "embed_dim"})
    sizes |= _read_sizes(vision, _VISION_SIZES) | _read_sizes(text, _TEXT_SIZES)
    options = _section(path, vision, "timm_model_kwargs")
    names = {"vision.layers": "depth", "vision.image_size": "img_size", "vision.width": "embed_dim"}
    sizes |= _read_sizes(options, names | {"vision.class_token": "class_token"})
    if isinstance(bias := text.get("proj_bias"), bool):
        sizes["text.projection"] = "bias" if bias else "linear"
    return Settings(fields, sizes, preprocess, width, path.name, clean)


def _read_sizes(section: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Returns the sizes that a section states, by their fields."""
    stated = {
        field: section[name] for field, name in names.items() if section.get(name) is not None
    }
    # A square may be stated by both sides.
    return {k: v[0] if isinstance(v, list) and v == v[:1] * 2 else v for k, v in stated.items()}


def _refuse_unknown(path: Path, group: str, section: dict[str, Any], known: set[str]) -> None:
    """Raises InputError if a section has a setting that is not known, and that it turns on."""
    for name in sorted(section.keys() - known):
        if section[name] not in (None, False, 0, "", {}, []):
            value = f"{section[name]!r:.99}"
            raise InputError(f"{path}: {group}.{name} is {value}, a setting that is not supported")


def _read_vit(path: Path, vision: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Returns width and fields of open_clip's own image tower."""
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    for name, value in (("vision_cfg.width", width), ("vision_cfg.head_width", head_width)):
        _check_positive(path, name, value)
    if width % head_width:
        problem = f"vision_cfg.width {width} is not a multiple of head_width {head_width}"
        raise InputError(f"{path}: {problem}")
    layers = vision.get("layers", 12)
    _check(path, "vision_cfg.layers", layers, type(layers) is int, "one number, of a ViT")
    return width, {"vision.heads": width // head_width}


def _read_timm(path: Path, name: Any, vision: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of timm's image tower."""
    fields = dict(timm_tower(str(name)) or {})
    families = "SigLIP, PE-Core, EVA-02-CLIP and plain ViT-CLIP towers"
    _check(path, "vision_cfg.timm_model_name", name, bool(fields), families)
    pool = vision.get("timm_pool", "avg")  # open_clip's default
    _check(path, "vision_cfg.timm_pool", pool, pool in ("", "map", "token"), "map or token")
    projection = vision.get("timm_proj", "linear")  # open_clip's default
    supported = projection in (None, "", "none")
    _check(path, "vision_cfg.timm_proj", projection, supported, "none or null")
    if pool not in ("", "map" if fields["vision.pool"] == "attention" else "token"):
        raise InputError(f"{path}: vision_cfg.timm_pool is {pool!r}, not that of {name}")
    options = _section(path, vision, "timm_model_kwargs")
    _refuse_unknown(path, "vision_cfg.timm_model_kwargs", options, set(_TIMM_OPTIONS))
    if (heads := options.get("num_heads")) is not None:
        _check_positive(path, "vision_cfg.timm_model_kwargs.num_heads", heads)
        fields["vision.heads"] = heads
    grid = options.get("ref_feat_shape")
    if grid is not None:
        square = isinstance(grid, list) and len(grid) == 2 and type(grid[0]) is int
        square = square and grid[0] == grid[1]
        _check(path, "vision_cfg.timm_model_kwargs.ref_feat_shape", grid, square, "a square")
        fields["vision.rotary_grid"] = grid[0]
    return fields


def _read_text(path: Path, text: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of open_clip's text tower."""
    heads = text.get("heads", 8)
    _check_positive(path, "text_cfg.heads", heads)
    fields = {"text.heads": heads, "text.causal": not text.get("no_causal_mask")}
    fields["text.pool"] = pool = text.get("pool_type", "argmax")
    _check(path, "text_cfg.pool_type", pool, pool in ("argmax", "last"), "argmax or last")
    kind = text.get("proj_type", "linear")
    _check(path, "text_cfg.proj_type", kind, kind == "linear", "linear")
    norm, act = (_section(path, text, name) for name in ("norm_kwargs", "act_kwargs"))
    epsilon = norm.get("eps", 1e-5)
    valid = _is_number(epsilon) and epsilon > 0 and norm.keys() <= {"eps"}
    _check(path, "text_cfg.norm_kwargs", norm, valid, "eps")
    fields["text.epsilon"] = float(epsilon)
    tanh = {"approximate": "tanh"}
    _check(path, "text_cfg.act_kwargs", act, act in ({}, tanh), f"{{}} or {tanh}")
    if act:
        fields["activation"] = "gelu_tanh"
    if "siglip" in str(text.get("hf_tokenizer_name")).lower():  # it adds no start tokens
        fields["text.start_token"] = False
    return fields


def _read_transform(path: Path, stated: dict[str, Any]) -> PreprocessConfig | None:
    """Reads open_clip's preprocess_cfg, None if it is empty."""
    if not stated:
        return None
    allowed = {"resize_mode": {"shortest": "crop", "squash": "squash"}}
    allowed["interpolation"] = {"bicubic": "bicubic", "bilinear": "bilinear"}
    mode = stated.get("mode", "RGB")
    _check(path, "preprocess_cfg.mode", mode, mode == "RGB", "RGB")
    values = {name: stated.get(name, next(iter(names))) for name, names in allowed.items()}
    for name, value in values.items():
        supported = isinstance(value, str) and value in allowed[name]
        _check(path, f"preprocess_cfg.{name}", value, supported, " or ".join(allowed[name]))
    resize = allowed["resize_mode"][values["resize_mode"]]
    rgb = {"mean": stated.get("mean"), "std": stated.get("std")}
    return _preprocess(path, rgb, resize=resize, interpolation=values["interpolation"])


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
    if kind not in _HF_KINDS:
        needed = "'clip' or 'siglip', or of a half, such as 'clip_text_model'"
        raise InputError(f"{path}: model_type is {kind!r:.99}, must be {needed}")
    family, towers = _HF_KINDS[kind]
    halves = [name for name in _HF_TOWERS if towers in ("both", name)]
    whole = {tower: _tower(path, config, tower, family) for tower in halves}
    if towers != "both":
        whole = {towers: config}
    fields = _hf_fields(path, whole, family) | {"towers": towers}
    preprocess = _read_preprocessor(folder, family) if "vision" in whole else None
    head = whole.get("vision", {}).get("vision_use_head", True)
    _check(path, "vision_use_head", head, head is True, "true")
    if family == "siglip":
        preprocess = preprocess or PreprocessConfig(**SIGLIP_PREPROCESS)
    vision = whole.get("vision", {})
    width = vision.get("hidden_size", _HF_DEFAULTS[family]["hidden_size"][0])
    _check_positive(path, "vision_config.hidden_size", width)
    sizes = {}
    for tower, section in whole.items():
        names = _HF_SIZES | (_HF_VISION if tower == "vision" else _HF_TEXT)
        sizes |= _read_sizes(section, {f"{tower}.{field}": name for field, name in names.items()})
    return Settings(fields, sizes, preprocess, width if vision else None, path.name)


def _hf_fields(path: Path, towers: dict[str, dict[str, Any]], family: str) -> dict[str, Any]:
    """Returns the fields of ModelConfig that the sections of the towers state."""
    for name, allowed in _HF_VALUES[family].items():
        values = [section.get(name, allowed[0]) for section in towers.values()]
        differs = any(value != values[0] for value in values) and family == "clip"
        if differs or any(value not in allowed for value in values):
            pairs = zip(values, towers, strict=True)
            actual = " and ".join(f"{value!r:.99} ({tower})" for value, tower in pairs)
            needed = " or ".join(map(str, allowed))
            raise InputError(f"{path}: {name} is {actual}; must be {needed} in both")
    fields, activations = dict(SIGLIP if family == "siglip" else {}), {}
    for tower, section in towers.items():
        default = _HF_DEFAULTS[family]["num_attention_heads"][tower == "text"]
        count = section.get("num_attention_heads", default)
        if type(count) is not int or count < 1:
            wrong = f"num_attention_heads ({tower}) is {count!r:.99}"
            raise InputError(f"{path}: {wrong}, must be a whole number of at least 1")
        fields[f"{tower}.heads"] = count
        activation = section.get("hidden_act", _HF_VALUES[family]["hidden_act"][0])
        activations[tower] = activation.replace("gelu_pytorch_tanh", "gelu_tanh")
    fields["activation"] = activations.get("text", activations.get("vision"))
    if activations.get("vision", fields["activation"]) != fields["activation"]:
        fields["vision.activation"] = activations["vision"]
    if "text" in towers and family == "clip":
        end = towers["text"].get("eos_token_id", 49407)
        _check(path, "eos_token_id", end, type(end) is int and end >= 0, "a token id")
        # 2 is what old files state wrongly: transformers then takes the largest id.
        fields |= {} if end == 2 else {"text.pool": "end", "text.end_id": end}
    return fields


def _tower(path: Path, config: dict[str, Any], tower: str, family: str) -> dict[str, Any]:
    """Returns the settings of a tower.

    transformers fills an old `*_config_dict` up with defaults and lets it win over `*_config`.
    """
    values = _section(path, config, f"{tower}_config")
    if not (old := _section(path, config, f"{tower}_config_dict")):
        return values
    defaults = {name: allowed[0] for name, allowed in _HF_VALUES[family].items()}
    heads = _HF_DEFAULTS[family]["num_attention_heads"][tower == "text"]
    return values | defaults | {"num_attention_heads": heads} | old


def _read_preprocessor(folder: Path, family: str) -> PreprocessConfig | None:
    """Reads preprocessor_config.json, or returns None if there is none.

    What it does not state is as in transformers' image processor of the family.
    """
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return None
    config = read_object(path)
    kind, crops = config.get("image_processor_type", "CLIP"), config.get("do_center_crop")
    known = isinstance(kind, str) and re.match(r"CLIP|Siglip(?!2)", kind) is not None
    _check(path, "image_processor_type", kind, known, "that of CLIP or of SigLIP")
    for name in ("do_pad", "max_num_patches"):
        _check(path, name, config.get(name), not config.get(name), "its absence")
    square = {"height": 224, "width": 224}
    size = config.get("size", square if family == "siglip" else 224)
    squash = isinstance(size, dict) and "height" in size and not crops
    if squash:
        square = size.get("height") == size.get("width") and type(size["height"]) is int
        _check(path, "size", size, square, "a square or the shortest edge")
    else:
        side = size.get("shortest_edge") if isinstance(size, dict) else size
        _check(path, "size", size, type(side) is int, "the shortest edge")
        crop = config.get("crop_size", side)
        same = crop in (side, {"height": side, "width": side})
        _check(path, "crop_size", crop, same, f"{side}")
        crops = config.get("do_center_crop", True)
        _check(path, "do_center_crop", crops, crops is True, "true")
    for name in ("do_resize", "do_rescale"):
        _check(path, name, config.get(name, True), config.get(name, True) is True, "true")
    flip = config.get("do_flip_channel_order", False)
    _check(path, "do_flip_channel_order", flip, not flip, "false")
    factor = config.get("rescale_factor", 1 / 255)
    is_usual = _is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-3)
    _check(path, "rescale_factor", factor, is_usual, "1/255")
    resample = config.get("resample", 3)
    known = type(resample) is int and resample in _FILTERS
    _check(path, "resample", resample, known, "2, bilinear, or 3, bicubic")
    half = [0.5] * 3 if family == "siglip" else None
    rgb = {"mean": config.get("image_mean", half), "std": config.get("image_std", half)}
    if config.get("do_normalize") is False:
        rgb = {"mean": [0.0] * 3, "std": [1.0] * 3}
    resize = "squash" if squash else "crop"
    return _preprocess(path, rgb, resize=resize, interpolation=_FILTERS[resample])


def _preprocess(path: Path, values: dict[str, Any], **options: Any) -> PreprocessConfig:
    """Returns a PreprocessConfig of mean and std, of which None is CLIP's, and other options."""
    numbers = {}
    for name, value in values.items():
        if value is None:
            continue
        is_list = isinstance(value, list) and len(value) == 3
        if not is_list or not all(map(_is_number, value)) or not is_rgb(value, name):
            rule = "three numbers above 0, at most 1" if name == "std" else "three numbers, 0 to 1"
            raise InputError(f"{path}: {name} is {value!r:.99}: must be {rule}")
        numbers[name] = tuple(map(float, value))
    return PreprocessConfig(**numbers, **options)


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
