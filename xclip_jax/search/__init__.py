"""Searches a video collection by sentence, video or image: index a folder, then query it."""

import importlib.util
import os

if missing := [one for one in ("faiss", "lancedb") if not importlib.util.find_spec(one)]:
    advice = "run pip install -e '.[search]'"
    raise ModuleNotFoundError(f"search requires {', '.join(missing)}: {advice}", name=missing[0])
os.environ.setdefault("LANCEDB_LOG", "error")  # "No existing dataset ..., it will be created"
os.environ.setdefault("LANCE_MAX_IOP_SIZE", str(2**25))  # bytes of a request; by default, half
if (os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or "").startswith("http:"):
    os.environ.setdefault("AWS_ALLOW_HTTP", "true")

from xclip_jax.search.index import Index
from xclip_jax.search.indexing import IndexingSummary
from xclip_jax.search.results import Answer, Film, HeatMap, Hit, Match

__all__ = ["Answer", "Film", "HeatMap", "Hit", "Index", "IndexingSummary", "Match"]
