"""Reads the bodies of requests, within limits of size and time."""

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from xclip_jax.search.guard import IDLE_SECONDS

MAX_JSON_BYTES, MAX_UPLOAD_BYTES = 2**17, 500 * 2**20
UPLOAD_SECONDS = 600  # the longest time of one upload
MIN_BYTES_A_SECOND = 2**15  # of a request's body, after the first seconds
CLOSE = {"Connection": "close"}  # the rest of the request is not read
NOT_JSON = "the request is not a JSON object with Content-Type: application/json"


class LimitedRequest(Request):
    """A request whose body is read within limits."""

    async def stream(self) -> AsyncIterator[bytes]:
        """Yields the body of at most MAX_JSON_BYTES in chunks."""
        async for chunk in _read_chunks(self, super().stream(), MAX_JSON_BYTES):
            yield chunk

    async def json(self) -> Any:
        """Returns the body as JSON, or raises HTTP 400."""
        try:
            return json.loads(await self.body())
        except (ValueError, RecursionError):
            raise HTTPException(400, NOT_JSON) from None


def read_upload(request: Request) -> AsyncIterator[bytes]:
    """Yields the body of at most MAX_UPLOAD_BYTES in chunks."""
    chunks = Request(request.scope, request.receive).stream()
    return _read_chunks(request, chunks, MAX_UPLOAD_BYTES)


async def _read_chunks(
    request: Request, chunks: AsyncIterator[bytes], max_bytes: int
) -> AsyncIterator[bytes]:
    """Yields chunks of a request's body.

    Raises HTTP 413 if it is larger than `max_bytes`, 408 if the client stops sending or sends less
    than MIN_BYTES_A_SECOND.
    """
    declared, size = int(request.headers.get("content-length") or 0), 0
    start = anyio.current_time()
    while True:
        seconds = min(UPLOAD_SECONDS, IDLE_SECONDS + size / MIN_BYTES_A_SECOND)
        wait = min(IDLE_SECONDS, start + seconds - anyio.current_time())
        try:
            with anyio.fail_after(wait):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise HTTPException(408, "the request takes too long", CLOSE) from None
        if chunk is None:
            return
        size += len(chunk)
        if max(size, declared) > max_bytes:
            raise HTTPException(413, f"more than {max_bytes / 2**20:.3g} MB", CLOSE)
        yield chunk


class LimitedRoute(APIRoute):
    """A route whose handler gets a `LimitedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns the handler."""
        handle = super().get_route_handler()

        async def handle_limited(request: Request) -> Response:
            return await handle(LimitedRequest(request.scope, request.receive))

        return handle_limited
