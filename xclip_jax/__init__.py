"""Video-text retrieval with multi-grained contrast (X-CLIP) in JAX/Flax.

retriever = xclip_jax.load("runs/demo")
sim_TxV = retriever.similarity(
    retriever.encode_text(["a dog rides a skateboard"]), retriever.encode_video(["dog.mp4"])
)
"""

import importlib

__version__ = "0.1.0"
_WHERE = {
    "load": "retriever",
    "Retriever": "retriever",
    "load_tokenizer": "data.text",
    "TextFeatures": "similarity",
    "VideoFeatures": "similarity",
    "InputError": "cli",
}
__all__ = ["InputError", "Retriever", "TextFeatures", "VideoFeatures", "load", "load_tokenizer"]


def __getattr__(name):
    """Imports on first use: `xclip_jax.prepare` starts its workers without loading JAX."""
    if name in _WHERE:
        return getattr(importlib.import_module(f"xclip_jax.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'xclip_jax' has no attribute {name!r}")
