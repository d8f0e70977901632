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
    from xclip_jax.push import push_to_hub
    from xclip_jax.retriever import Retriever, TextFeatures, VideoFeatures, from_pretrained, load

__version__ = "0.1.0"
__all__ = ["InputError", "Retriever", "TextFeatures", "VideoFeatures", "from_pretrained", "load"]
__all__ += ["load_tokenizer", "push_to_hub"]
_MODULES = {"InputError": "cli", "load_tokenizer": "data.text", "push_to_hub": "push"}


def __getattr__(name: str) -> Any:
    """Imports public names on first use, so the workers of `prepare` start without JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'xclip_jax' has no attribute {name!r}")
    module = importlib.import_module(f"xclip_jax.{_MODULES.get(name, 'retriever')}")
    return getattr(module, name)
