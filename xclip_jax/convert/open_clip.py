"""Reads open_clip_config.json: activation, heads, options of both towers, preprocessing."""

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
from xclip_jax.models.families import timm_tower

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
_TIMM_SIZES = {"vision.layers": "depth", "vision.image_size": "img_size"}
_TIMM_SIZES |= {"vision.patch_size": "patch_size", "vision.width": "embed_dim"}
_TIMM_SIZES |= {"vision.class_token": "class_token"}
_TEXT_SIZES = {f"text.{n}": n for n in ("layers", "width", "context_length", "vocab_size")}


def read_open_clip(folder: Path) -> Settings | None:
    """Reads open_clip_config.json, or returns None if there is none.

    Defaults are those of https://github.com/mlfoundations/open_clip, src/open_clip/model.py.
    """
    path = folder / "open_clip_config.json"
    if not path.exists():
        return None
    config = read_object(path)
    model = section_of(path, config, "model_cfg") or config
    vision, text = (section_of(path, model, f"{tower}_cfg") for tower in ("vision", "text"))
    if model.get("multimodal_cfg"):
        problem = "multimodal_cfg: a CoCa, which also writes captions"
        raise InputError(f"{path}: {problem}, is not supported")
    for group, allowed in _OPEN_CLIP.items():
        section = section_of(path, model, group)
        for name, value in allowed.items():
            stated = section.get(name)
            check_value(path, f"{group}.{name}", stated, stated in (None, value), repr(value))
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
    clean = section_of(path, text, "tokenizer_kwargs").get("clean")
    known = clean in (None, "lower", "canonicalize")
    check_value(path, "text_cfg.tokenizer_kwargs.clean", clean, known, "lower or canonicalize")
    preprocess = _read_transform(path, section_of(path, config, "preprocess_cfg"))
    sizes = read_sizes(model, {"embed_dim": "embed_dim"})
    sizes |= read_sizes(vision, _VISION_SIZES) | read_sizes(text, _TEXT_SIZES)
    options = section_of(path, vision, "timm_model_kwargs")
    for field, value in read_sizes(options, _TIMM_SIZES).items():
        if sizes.setdefault(field, value) != value:
            problem = f"vision_cfg states {field} = {sizes[field]!r:.99}"
            raise InputError(f"{path}: {problem}, its timm_model_kwargs {value!r:.99}")
    if isinstance(bias := text.get("proj_bias"), bool):
        sizes["text.projection"] = "bias" if bias else "linear"
    return Settings(fields, sizes, preprocess, width, path.name, clean)


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
        check_positive(path, name, value)
    if width % head_width:
        problem = f"vision_cfg.width {width} is not a multiple of head_width {head_width}"
        raise InputError(f"{path}: {problem}")
    layers = vision.get("layers", 12)
    check_value(path, "vision_cfg.layers", layers, type(layers) is int, "one number, of a ViT")
    return width, {"vision.heads": width // head_width}


def _read_timm(path: Path, name: Any, vision: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of timm's image tower."""
    fields = dict(timm_tower(str(name)) or {})
    families = "SigLIP, PE-Core, EVA-02-CLIP and plain ViT-CLIP towers"
    check_value(path, "vision_cfg.timm_model_name", name, bool(fields), families)
    pool = vision.get("timm_pool", "avg")  # open_clip's default
    check_value(path, "vision_cfg.timm_pool", pool, pool in ("", "map", "token"), "map or token")
    projection = vision.get("timm_proj", "linear")  # open_clip's default
    supported = projection in (None, "", "none")
    check_value(path, "vision_cfg.timm_proj", projection, supported, "none or null")
    if pool not in ("", "map" if fields["vision.pool"] == "attention" else "token"):
        raise InputError(f"{path}: vision_cfg.timm_pool is {pool!r}, not that of {name}")
    options = section_of(path, vision, "timm_model_kwargs")
    _refuse_unknown(path, "vision_cfg.timm_model_kwargs", options, set(_TIMM_OPTIONS))
    if (heads := options.get("num_heads")) is not None:
        check_positive(path, "vision_cfg.timm_model_kwargs.num_heads", heads)
        fields["vision.heads"] = heads
    grid = options.get("ref_feat_shape")
    if grid is not None:
        square = isinstance(grid, list) and len(grid) == 2 and type(grid[0]) is int
        square = square and grid[0] == grid[1]
        check_value(path, "vision_cfg.timm_model_kwargs.ref_feat_shape", grid, square, "a square")
        fields["vision.rotary_grid"] = grid[0]
    return fields


def _read_text(path: Path, text: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of open_clip's text tower."""
    heads = text.get("heads", 8)
    check_positive(path, "text_cfg.heads", heads)
    fields = {"text.heads": heads, "text.causal": not text.get("no_causal_mask")}
    fields["text.pool"] = pool = text.get("pool_type", "argmax")
    check_value(path, "text_cfg.pool_type", pool, pool in ("argmax", "last"), "argmax or last")
    kind = text.get("proj_type", "linear")
    check_value(path, "text_cfg.proj_type", kind, kind == "linear", "linear")
    norm, act = (section_of(path, text, name) for name in ("norm_kwargs", "act_kwargs"))
    epsilon = norm.get("eps", 1e-5)
    valid = is_number(epsilon) and epsilon > 0 and norm.keys() <= {"eps"}
    check_value(path, "text_cfg.norm_kwargs", norm, valid, "eps")
    fields["text.epsilon"] = float(epsilon)
    tanh = {"approximate": "tanh"}
    check_value(path, "text_cfg.act_kwargs", act, act in ({}, tanh), f"{{}} or {tanh}")
    if act:
        fields["activation"] = "gelu_tanh"
    if pool == "last":  # SigLIP, whose tokenizer adds no start token
        fields["text.start_token"] = False
    return fields


def _read_transform(path: Path, stated: dict[str, Any]) -> PreprocessConfig | None:
    """Reads open_clip's preprocess_cfg, None if it is empty."""
    if not stated:
        return None
    allowed = {"resize_mode": {"shortest": "crop", "squash": "squash"}}
    allowed["interpolation"] = {"bicubic": "bicubic", "bilinear": "bilinear"}
    mode = stated.get("mode", "RGB")
    check_value(path, "preprocess_cfg.mode", mode, mode == "RGB", "RGB")
    values = {name: stated.get(name, next(iter(names))) for name, names in allowed.items()}
    for name, value in values.items():
        supported = isinstance(value, str) and value in allowed[name]
        check_value(path, f"preprocess_cfg.{name}", value, supported, " or ".join(allowed[name]))
    resize = allowed["resize_mode"][values["resize_mode"]]
    rgb = {"mean": stated.get("mean"), "std": stated.get("std")}
    return make_preprocess(path, rgb, resize=resize, interpolation=values["interpolation"])
