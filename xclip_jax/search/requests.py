"""What a request to the search page may ask for: checked, or refused in words for the user."""

import json
import math
import re
from pathlib import Path

from starlette.exceptions import HTTPException

from xclip_jax.cli import InputError

DEFAULT_HITS, MOST_HITS = 12, 100
MOST_ASKED = 2**20  # bytes of a query's JSON


async def chunks_of(request, limit):
    """The request's body in chunks, or 413."""
    too_big = HTTPException(413, f"more than {limit / 2**20:,.0f} MB")
    if int(request.headers.get("content-length") or 0) > limit:
        raise too_big
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_big
        yield chunk


async def asked_json(request):
    """The JSON object that a request brings."""
    body = b"".join([chunk async for chunk in chunks_of(request, MOST_ASKED)])
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise InputError("the request is not a JSON object")
    return asked


def text_of(asked, name):
    """A text, or "" where there is none."""
    text = asked.get(name) or ""
    if not isinstance(text, str):
        raise InputError(f"{name} is not a text")
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half a character


def count_of(asked):
    """How many results, 1 to MOST_HITS."""
    k = asked.get("k", DEFAULT_HITS)
    try:
        k = int(k)
    except (TypeError, ValueError, OverflowError):
        k = 0
    if not 1 <= k <= MOST_HITS:
        raise InputError(f"the number of results lies between 1 and {MOST_HITS}")
    return k


def seconds_of(asked, name):
    """A time of at least 0, or None where there is none."""
    value = asked.get(name)
    if value in (None, ""):
        return None
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"{name} is not a number of seconds")
    return value


def options_of(asked):
    """The options of a query that say where to look and how much to show."""
    limits = {name: seconds_of(asked, name) for name in ("start", "end")}
    return {"k": count_of(asked), "path": text_of(asked, "path") or None, **limits}


def suffix_of(name):
    """Of an example's name: it tells an image from a video; nothing else of it is used."""
    suffix = Path(name).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ""
