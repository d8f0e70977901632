"""Searches a video collection by sentence, video or image: index a folder, then query it."""

import os

os.environ.setdefault("LANCEDB_LOG", "error")  # "No existing dataset ..., it will be created"
os.environ.setdefault("LANCE_MAX_IOP_SIZE", str(2**25))  # bytes of a request; by default, half

from xclip_jax.search.index import Index
from xclip_jax.search.indexing import IndexingSummary
from xclip_jax.search.results import Answer, Film, HeatMap, Hit, Match

__all__ = ["Answer", "Film", "HeatMap", "Hit", "Index", "IndexingSummary", "Match"]
