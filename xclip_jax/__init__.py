"""Video-text retrieval with multi-grained contrast (X-CLIP) in JAX/Flax.

retriever = xclip_jax.load("runs/demo")
sim_TxV = retriever.similarity(
    retriever.encode_text(["a dog rides a skateboard"]), retriever.encode_video(["dog.mp4"])
)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xclip_jax.cli import InputError
    from xclip_jax.data.text import load_tokenizer
    from xclip_jax.retriever import Retriever, TextFeatures, VideoFeatures, load

__version__ = "0.1.0"
__all__ = ["InputError", "Retriever", "TextFeatures", "VideoFeatures", "load", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Imports public names on first use, so the workers of `prepare` start without JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'xclip_jax' has no attribute {name!r}")
    module = {"InputError": "cli", "load_tokenizer": "data.text"}.get(name, "retriever")
    return getattr(importlib.import_module(f"xclip_jax.{module}"), name)
