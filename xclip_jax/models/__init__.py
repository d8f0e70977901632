"""Models, built from a plain description of their architecture."""

import copy

import jax.numpy as jnp

from xclip_jax.models.clip import TextConfig, VisionConfig
from xclip_jax.models.xclip import XClip

# What the paper says and what its PyTorch release computes (docs/paper-vs-code.md).
PRESETS = {
    "paper": {
        "frame_features": "temporal",
        "words": "word_tokens",
        "padding": "masked",
        "matrices": "none",
        "temporal": {"layers": 3, "residual": "no"},
    },
    "official": {
        "frame_features": "clip",
        "words": "all_tokens",
        "padding": "competes",
        "matrices": "learned",
        "temporal": {"layers": 4, "residual": "yes"},
    },
}
# CLIP4Clip's heads (https://arxiv.org/abs/2104.08860): a cosine of sentence and video, but for the
# last, which scores each pair by a Transformer of its own.
_COSINE = {"granularities": ["video_sentence"], "fusion": "mean", "matrices": "none"}
HEADS = {
    "xclip": {},
    "mean_pooling": {**_COSINE, "temporal": {"type": "none"}},
    "seq_lstm": {**_COSINE, "temporal": {"type": "lstm", "residual": "yes"}},
    "seq_transformer": {**_COSINE, "temporal": {"type": "transformer", "residual": "yes"}},
    "tight_transformer": {**_COSINE, "temporal": {"type": "none"}},
}


def resolve(model):
    """config.model as a plain dict, with what the preset and the head say filled in."""
    resolved = copy.deepcopy(model)
    for name, value in PRESETS[model["preset"]].items():
        if isinstance(value, dict):
            for key, inner in value.items():
                resolved[name][key] = resolved[name][key] or inner
        else:
            resolved[name] = resolved[name] or value
    for name, value in HEADS[model["head"]].items():
        resolved[name] = {**resolved[name], **value} if isinstance(value, dict) else value
    return resolved


def build_model(architecture):
    """The linen module of an architecture: a plain dict as from `resolve`."""
    a = architecture
    return XClip(
        vision=VisionConfig(**a["vision"]),
        text=TextConfig(**a["text"]),
        embed_dim=a["embed_dim"],
        activation=a["activation"],
        max_words=a["max_words"],
        max_frames=a["max_frames"],
        temporal=a["temporal"]["type"],
        temporal_layers=a["temporal"]["layers"],
        temporal_heads=a["temporal"]["heads"],
        temporal_residual=a["temporal"]["residual"] == "yes",
        frame_features=a["frame_features"],
        words=a["words"],
        padding=a["padding"],
        matrices=a["matrices"] == "learned",
        granularities=tuple(a["granularities"]),
        aggregation=a["aggregation"],
        tau=a["tau"],
        fusion="tight_transformer" if a["head"] == "tight_transformer" else a["fusion"],
        dtype=jnp.dtype(a["dtype"]),
        remat=a["remat"],
    )
