"""Searches a video collection by sentence, video or image: index a folder, then query it."""

from xclip_jax.search.funnel import Answer, Attention, Hit
from xclip_jax.search.index import Index
from xclip_jax.search.indexing import IndexingSummary

__all__ = ["Answer", "Attention", "Hit", "Index", "IndexingSummary"]
