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
    from xclip_jax.retriever import Retriever, load
    from xclip_jax.similarity import TextFeatures, VideoFeatures

__version__ = "0.1.0"
_MODULES = {
    "load": "retriever",
    "Retriever": "retriever",
    "load_tokenizer": "data.text",
    "TextFeatures": "similarity",
    "VideoFeatures": "similarity",
    "InputError": "cli",
}
__all__ = ["InputError", "Retriever", "TextFeatures", "VideoFeatures", "load", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Imports public names on first use, so the workers of `prepare` start without JAX."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"xclip_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'xclip_jax' has no attribute {name!r}")
