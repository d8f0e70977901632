"""Video-text retrieval with multi-grained contrast (X-CLIP) in JAX/Flax."""

__version__ = "0.1.0"
