"""Search in a video collection: index a folder, type a sentence, get the matching second."""

from xclip_jax.search.funnel import Answer, Attention, Hit
from xclip_jax.search.index import Index
from xclip_jax.search.indexing import IndexingSummary

__all__ = ["Answer", "Attention", "Hit", "Index", "IndexingSummary"]
