"""Search over one's own videos: index a folder, type a sentence, get the second."""

from xclip_jax.search.index import Index
from xclip_jax.search.indexing import Added
from xclip_jax.search.results import Answer, Attention, Hit

__all__ = ["Added", "Answer", "Attention", "Hit", "Index"]
