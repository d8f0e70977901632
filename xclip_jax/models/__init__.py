"""Models, built from a plain description of their architecture."""

import jax.numpy as jnp

from xclip_jax.models.clip import TextConfig, VisionConfig
from xclip_jax.models.xclip import XClip


def build_model(architecture):
    """The linen module of an architecture: a plain dict with the fields of config.model."""
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
        granularities=tuple(a["granularities"]),
        aggregation=a["aggregation"],
        tau=a["tau"],
        dtype=jnp.dtype(a["dtype"]),
        remat=a["remat"],
    )
