"""Settings of encoder families that their checkpoints do not store: dotted fields of ModelConfig.

What the shapes of the weights tell (widths, layers, class token, biases, pools) is read from them.
"""

import re
from typing import Any

Fields = dict[str, Any]

CLIP: Fields = {"activation": "quick_gelu"}
# SigLIP (Zhai et al., 2023, https://arxiv.org/abs/2303.15343) and SigLIP 2 (Tschannen et al., 2025,
# https://arxiv.org/abs/2502.14786), as in big_vision and transformers.
SIGLIP: Fields = {
    "activation": "gelu_tanh",
    "vision.epsilon": 1e-6,
    "text.epsilon": 1e-6,
    "text.causal": False,
    "text.start_token": False,
    "text.pool": "last",
    "max_scale": 0.0,
}
# Perception Encoder, PE-Core (Bolya et al., 2025, https://arxiv.org/abs/2504.13181).
PE: Fields = {
    "activation": "gelu",
    "vision.rotary": "columns_first",
    "vision.pool_heads": 8,
    "vision.position_resize": "bilinear",
}
SQUASHED = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize": "squash"}
PE_PREPROCESS: Fields = SQUASHED | {"interpolation": "bilinear"}
SIGLIP_PREPROCESS: Fields = SQUASHED
# VideoPrism-LvT (Zhao et al., 2024, https://arxiv.org/abs/2402.13217).
VIDEOPRISM: Fields = {
    "activation": "relu",
    "vision.activation": "gelu",
    "vision.position_resize": "antialias",
    "text.context_length": 64,
    "text.pool": "class_token",
    "text.start_token": False,
    "text.end_token": False,
    "text.projection": "none",
}
VIDEOPRISM |= {f"{tower}.epsilon": 1e-6 for tower in ("vision", "text")}
VIDEOPRISM |= {f"{tower}.logit_cap": 50.0 for tower in ("vision", "text")}
VIDEOPRISM_PREPROCESS: Fields = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "resize": "squash"}
VIDEOPRISM_PREPROCESS |= {"interpolation": "lanczos", "spread": True}
# EVA-02-CLIP (Sun et al., 2023, https://arxiv.org/abs/2303.15389; Fang et al., 2023,
# https://arxiv.org/abs/2303.11331).
EVA02: Fields = {
    "vision.activation": "silu",
    "vision.epsilon": 1e-6,
    "vision.rotary": "rows_first",
    "vision.rotary_grid": 16,
    "vision.gated": True,
    "vision.inner_norms": True,
}
_TOKEN = {"vision.class_token": True, "vision.pool": "class_token"}
_POOL = {"vision.class_token": False, "vision.pool": "attention", "vision.gated": False}
_GELU = _TOKEN | {"vision.activation": "gelu", "vision.pre_norm": True, "vision.gated": False}
_QUICK, _HUGE = _GELU | {"vision.activation": "quick_gelu"}, {"vision.heads": 16}
_SIGLIP = _POOL | {"vision.activation": "gelu", "vision.pre_norm": False, "vision.epsilon": 1e-6}
_SIGLIP_TANH = _SIGLIP | {"vision.activation": "gelu_tanh"}
_PE = {"vision." + k.removeprefix("vision."): v for k, v in PE.items()}
_PE |= {"vision.class_token": True, "vision.pool": "attention", "vision.pre_norm": True}
# timm's image towers (https://github.com/huggingface/pytorch-image-models) by their names. Heads
# are 64 wide where they are not stated.
_TIMM: dict[str, Fields] = {
    r"vit_base_patch16_siglip_(224|256|384|512)": _SIGLIP,
    r"vit_large_patch16_siglip_(256|384)": _SIGLIP,
    r"vit_base_patch32_siglip_256|vit_large_patch16_siglip_512": _SIGLIP_TANH,
    r"vit_so400m_patch14_siglip_(224|378|384)": _SIGLIP | _HUGE,
    r"vit_so400m_patch16_siglip_(256|384|512)": _SIGLIP_TANH | _HUGE,
    r"vit_giantopt_patch16_siglip_(256|384)": _SIGLIP_TANH | _HUGE,
    r"vit_pe_core_(tiny|small)_patch16_384|vit_pe_core_base_patch16_224": _PE,
    r"vit_pe_core_large_patch14_336": _PE,
    r"vit_pe_core_gigantic_patch14_448": _PE | _HUGE | {"vision.class_token": False},
    r"eva02_base_patch16_clip_224|eva02_large_patch14_clip_(224|336)": _TOKEN | EVA02,
    r"vit_(base_patch(16|32)|large_patch14)_clip_\d+": _GELU,
    r"vit_(huge|giant|gigantic)_patch14_clip_\d+": _GELU | _HUGE,
    r"vit_(base_patch(16|32)|large_patch14)_clip_quickgelu_\d+": _QUICK,
    r"vit_(huge|gigantic)_patch14_clip_quickgelu_\d+": _QUICK | _HUGE,
}
# Words of config files -> model on the Hugging Face hub.
PUBLISHED = {
    "siglip2_b16": "google/siglip2-base-patch16-224",
    "siglip2_l16": "google/siglip2-large-patch16-256",
    "pe_b16": "facebook/PE-Core-B16-224",
    "pe_l14": "facebook/PE-Core-L14-336",
    "videoprism_b": "google/videoprism-lvt-base-f16r288",
    "videoprism_l": "google/videoprism-lvt-large-f8r288",
}


def timm_tower(name: str) -> Fields | None:
    """Returns the settings of an image tower by timm's name, None if it is unknown."""
    stem = name.partition(".")[0]
    found = (fields for pattern, fields in _TIMM.items() if re.fullmatch(pattern, stem))
    fields = next(found, None)
    if fields and fields.get("vision.rotary") == "columns_first":
        # Where PE's own code counts patches at any size, timm scales to the grid of its name.
        patch, side = map(int, re.findall(r"\d+", stem)[-2:])
        fields = fields | {"vision.rotary_grid": side // patch}
    return fields
