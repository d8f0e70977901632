"""The models: CLIP, X-CLIP and the heads that the paper compares it with."""

from xclip_jax.models.config import ModelConfig, read_model_config
from xclip_jax.models.xclip import XClip

__all__ = ["ModelConfig", "XClip", "read_model_config"]
