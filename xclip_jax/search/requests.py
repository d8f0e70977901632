"""Parses and validates the requests that the search page sends."""

import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from xclip_jax.cli import InputError

DEFAULT_HITS, MAX_HITS = 12, 100
MAX_JSON_BYTES = 2**20


async def read_chunks(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """Yields the body in chunks, or raises HTTP 413 if it is larger than `max_bytes`."""
    too_large = HTTPException(413, f"more than {max_bytes / 2**20:,.0f} MB")
    if int(request.headers.get("content-length") or 0) > max_bytes:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise too_large
        yield chunk


async def read_json(request: Request) -> dict[str, Any]:
    """Returns the JSON object in the body."""
    body = b"".join([chunk async for chunk in read_chunks(request, MAX_JSON_BYTES)])
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InputError("the request is not a JSON object")
    return fields


def parse_text(fields: Mapping[str, Any], name: str) -> str:
    """Returns a string field, or "" if it is missing."""
    text = fields.get(name) or ""
    if not isinstance(text, str):
        raise InputError(f"{name} must be a string")
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON allows lone surrogates


def parse_count(fields: Mapping[str, Any]) -> int:
    """Returns `k`, the number of results, in [1, MAX_HITS]."""
    try:
        k = int(fields.get("k", DEFAULT_HITS))
    except (TypeError, ValueError, OverflowError):
        k = 0
    if not 1 <= k <= MAX_HITS:
        raise InputError(f"the number of results must be between 1 and {MAX_HITS}")
    return k


def parse_seconds(fields: Mapping[str, Any], name: str) -> float | None:
    """Returns a time of at least 0 seconds, or None if it is missing."""
    value = fields.get(name)
    if value in (None, ""):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(f"{name} must be a number of seconds, at least 0")
    return seconds


def parse_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of `Index.query`: k, path, start and end."""
    times = {name: parse_seconds(fields, name) for name in ("start", "end")}
    return {"k": parse_count(fields), "path": parse_text(fields, "path") or None, **times}


def safe_suffix(file_name: str) -> str:
    """Returns the suffix of an uploaded file, or "" if it is unusual."""
    suffix = Path(file_name).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ""
