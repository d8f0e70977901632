"""Web server of the search page.

Files are requested by the id of a segment: no path comes from a client. Work on the index and on
files runs in a few threads, so that other requests are still handled.
"""

import contextlib
import ipaddress
import logging
import mimetypes
import os
import re
import socket
import stat
import tempfile
import time
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xclip_jax.cli import InputError
from xclip_jax.data import video
from xclip_jax.search import requests
from xclip_jax.search.funnel import Answer, Hit
from xclip_jax.search.index import Index

PAGE = Path(__file__).with_name("page")
MAX_UPLOAD_BYTES = 500 * 2**20
STILL_SIDE = 480  # pixels, the longer side
REFRESH_SECONDS = 5
# Host names of a local server. Without this check, a web site whose name resolves to this machine
# ("DNS rebinding") could read the index through its visitor's browser.
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
CACHED = {"Cache-Control": "private, max-age=3600"}  # the pictures of an id do not change
REVALIDATED = {"Cache-Control": "no-cache"}  # an updated page needs its updated script


def serve(
    index: Index, host: str = "127.0.0.1", port: int = 7870, *, open_page: bool = False
) -> None:
    """Serves the page until Ctrl-C.

    Args:
        index: an open index.
        host: name or address to listen on; there is no password, so an address that other machines
            can reach is open to all of them.
        port: 0 for any free port.
        open_page: True to open the page in this machine's browser.

    Raises:
        InputError: the server cannot listen on the port, for instance because it is in use.
    """
    with _listen(host, port) as listener:
        local = _is_loopback(host)
        address = _address(host, listener.getsockname()[1])
        print(f"{index.location}: {index.num_segments:,} segments of {index.num_files:,} files")
        if not local:
            print("no password: everyone who can reach this address can search and watch")
        print(f"search page: {address}  (stop with Ctrl-C)", flush=True)
        app = make_app(index, (*LOCAL_HOSTS, host) if local else ("*",))
        if open_page:
            webbrowser.open(address)
        # `_handle_defect` logs errors. A video that is playing must not delay the shutdown.
        config = uvicorn.Config(
            app, log_level="critical", timeout_graceful_shutdown=1, server_header=False
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def make_app(index: Index, hosts: Sequence[str] = LOCAL_HOSTS) -> Starlette:
    """Returns the page and its JSON API as an ASGI application.

    Args:
        index: an open index.
        hosts: allowed values of the Host header; "*" allows any.
    """
    api = _Api(index)
    handlers: dict[Any, Any] = {
        InputError: lambda _, error: _error_response(400, str(error)),
        HTTPException: lambda _, error: _error_response(error.status_code, error.detail),
        ClientDisconnect: lambda *_: Response(status_code=400),  # never received
        Exception: _handle_defect,
    }
    return Starlette(
        routes=[
            _file_route("/", "index.html"),
            _file_route("/style.css", "style.css"),
            _file_route("/page.js", "page.js"),
            Route("/api/index", api.get_facts),
            Route("/api/search", api.search, methods=["POST"]),
            Route("/api/example", api.search_example, methods=["POST"]),
            Route("/api/like/{id}", api.search_like),
            Route("/api/attention/{id}", api.get_attention, methods=["POST"]),
            Route("/thumbnail/{id}", api.get_thumbnail),
            Route("/still/{id}", api.get_still),
            Route("/video/{id}", api.get_video),
        ],
        middleware=[
            Middleware(_SecurityHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
        ],
        exception_handlers=handlers,
        lifespan=api.keep_refreshed,
    )


class _Api:
    """The endpoints that the page uses."""

    def __init__(self, index: Index) -> None:
        self.index = index
        # Separate limits, so that a page of pictures does not delay the next query.
        self.query_limiter, self.picture_limiter = (
            anyio.CapacityLimiter(2),
            anyio.CapacityLimiter(2),
        )

    @contextlib.asynccontextmanager
    async def keep_refreshed(self, app: Starlette) -> AsyncIterator[None]:
        """Loads new versions of the index while the server runs."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._refresh)
            yield
            tasks.cancel_scope.cancel()

    async def _refresh(self) -> None:
        duration = 0.0
        while True:  # loading a large index takes seconds, so it takes at most a tenth of the time
            await anyio.sleep(max(REFRESH_SECONDS, 10 * duration))
            start = time.perf_counter()
            try:
                await run_sync(self.index.refresh, abandon_on_cancel=True)
            except Exception:  # a writer may be halfway through a commit: retried
                logging.getLogger(__name__).exception("the index could not be refreshed")
            duration = time.perf_counter() - start

    async def get_facts(self, request: Request) -> Response:
        """Describes the index."""
        path = Path(self.index.model_name)
        return JSONResponse(
            {
                "segments": self.index.num_segments,
                "files": self.index.num_files,
                "model": path.parent.name if path.name == "model" else path.name,
                "max_upload_bytes": MAX_UPLOAD_BYTES,
            }
        )

    async def search(self, request: Request) -> Response:
        """Searches by a sentence: {text, k, path, start, end}."""
        fields = await requests.read_json(request)
        text, options = requests.parse_text(fields, "text"), requests.parse_options(fields)
        return await self._respond(partial(self.index.query, text, **options))

    async def search_example(self, request: Request) -> Response:
        """Searches by an image or video: its bytes in the body, ?name=its name&k=..."""
        params = request.query_params
        options, name = requests.parse_options(params), params.get("name", "")
        with tempfile.NamedTemporaryFile(suffix=requests.safe_suffix(name)) as file:
            async for chunk in requests.read_chunks(request, MAX_UPLOAD_BYTES):
                await run_sync(file.write, chunk)
            await run_sync(file.flush)
            try:
                return await self._respond(partial(self.index.similar, file.name, **options))
            except InputError as error:  # the user does not know the temporary name
                raise InputError(str(error).replace(file.name, name or "the file")) from error

    async def search_like(self, request: Request) -> Response:
        """Searches by a segment of the index: ?k=."""
        segment = await self._segment(request)
        k = requests.parse_count(request.query_params)
        return await self._respond(partial(self.index.like, segment.id, k), like=_describe(segment))

    async def _respond(self, search: Callable[[], Answer], **fields: Any) -> Response:
        def timed_search() -> tuple[Answer, float]:
            start = time.perf_counter()
            return search(), time.perf_counter() - start

        answer, seconds = await run_sync(timed_search, limiter=self.query_limiter)
        hits = [
            _describe(hit) | {"rank": hit.rank, "score": hit.score, "second": hit.second}
            for hit in answer
        ]
        facts = {"hits": hits, "searched": answer.searched, "note": answer.note}
        return JSONResponse({**facts, "seconds": seconds, "stages": answer.seconds, **fields})

    async def get_attention(self, request: Request) -> Response:
        """Returns the attention between the words of {text} and the frames of a segment."""
        segment, fields = await self._segment(request), await requests.read_json(request)
        compute = partial(self.index.attention, segment.id, requests.parse_text(fields, "text"))
        attention = await run_sync(compute, limiter=self.query_limiter)
        weights = attention.weights_WxF.tolist()
        words, times = attention.words, attention.times
        return JSONResponse({"words": words, "times": times, "weights": weights})

    async def get_thumbnail(self, request: Request) -> Response:
        """Returns the stored picture of a segment."""
        segment = await self._segment(request)
        return await self._picture(partial(self.index.thumbnail, segment.id))

    async def get_still(self, request: Request) -> Response:
        """Returns the picture at ?second=, or the stored one if the file has none."""
        segment = await self._segment(request)
        second = requests.parse_seconds(request.query_params, "second") or 0.0

        def read() -> bytes:
            try:
                return video.read_still(segment.path, second, STILL_SIDE)
            except (video.VideoError, OSError):
                return self.index.thumbnail(segment.id)

        return await self._picture(read)

    async def _picture(self, read: Callable[[], bytes]) -> Response:
        jpeg = await run_sync(read, limiter=self.picture_limiter)
        return Response(jpeg, media_type="image/jpeg", headers=CACHED)

    async def get_video(self, request: Request) -> Response:
        """Returns the segment's file, also in the byte ranges that seeking needs."""
        segment = await self._segment(request)
        status = await run_sync(_readable_status, segment.path)
        return FileResponse(segment.path, media_type=_media_type(segment.path), stat_result=status)

    async def _segment(self, request: Request) -> Hit:
        """Returns the segment of the id in the path, or raises HTTP 404."""
        segment_id = request.path_params["id"]
        try:
            if re.fullmatch("[0-9a-f]{16}", segment_id):
                return await run_sync(self.index.segment, segment_id)
        except KeyError:
            pass
        raise HTTPException(
            404, "this segment is not in the index, it may have been removed: search again"
        )


class _SecurityHeaders:
    """Middleware that adds SECURITY_HEADERS to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)


def _file_route(path: str, name: str) -> Route:
    return Route(path, lambda _: FileResponse(PAGE / name, headers=REVALIDATED))


def _error_response(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)


def _handle_defect(request: Request, error: Exception) -> Response:
    logging.getLogger(__name__).error("%s failed", request.url.path, exc_info=error)
    message = "internal error; see the terminal of the server"
    return JSONResponse({"error": message}, 500, SECURITY_HEADERS)  # bypasses the middleware


def _describe(segment: Hit) -> dict[str, Any]:
    """Returns the fields of a segment that the page shows, with '�' for invalid bytes of names."""
    path = os.fsencode(segment.path).decode("utf-8", "replace")
    fields = {"id": segment.id, "path": path, "name": os.path.basename(path)}
    return {**fields, "start": segment.start, "end": segment.end}


def _readable_status(path: str) -> os.stat_result:
    """Returns the status of a file that can be sent, or raises HTTP 404."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            open(path, "rb").close()  # fails now, not after the response has begun
            return status
        reason = "is no longer a file"
    except FileNotFoundError:
        reason = "is no longer on disk"
    except OSError:
        reason = "cannot be read"
    raise HTTPException(404, f"{os.path.basename(path)} {reason}")


def _media_type(path: str) -> str:
    """Returns the media type of a file, which is never one that browsers show as a web page."""
    guess = mimetypes.guess_type(path)[0] or ""
    return guess if guess.startswith(("video/", "audio/")) else "application/octet-stream"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host}, port {port}: {reason}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host: str, port: int) -> str:
    host = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
