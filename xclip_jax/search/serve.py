"""Web server of the search page.

Files are requested by the id of a segment: no path comes from a client. Work on the index and on
files runs in a few threads, so that other requests are still handled.
"""

import contextlib
import dataclasses
import ipaddress
import json
import logging
import mimetypes
import os
import re
import socket
import tempfile
import time
import webbrowser
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import uvicorn
from anyio.to_thread import run_sync
from pydantic import AfterValidator, BaseModel, Field, ValidationError
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
from xclip_jax.search.funnel import Answer, Hit
from xclip_jax.search.index import Index

PAGE = Path(__file__).with_name("page")
MAX_HITS, MAX_JSON_BYTES, MAX_UPLOAD_BYTES = 100, 2**20, 500 * 2**20
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
_RULE = "a number of seconds, at least 0"
Seconds = Annotated[float | None, Field(ge=0, allow_inf_nan=False, description=_RULE)]
# JSON allows lone surrogates.
Text = Annotated[str, AfterValidator(lambda text: text.encode("utf-8", "replace").decode())]


class Fields(BaseModel):
    """The fields of a request (see `Index.query`), with descriptions that errors quote."""

    text: Text = Field("", description="a string")
    path: Text | None = Field(None, description="a string")
    k: int = Field(12, ge=1, le=MAX_HITS, description=f"between 1 and {MAX_HITS}")
    start: Seconds = None
    end: Seconds = None
    second: Seconds = None  # of a picture

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Fields":
        """Validates fields, where None and "" count as missing."""
        try:
            given = {name: value for name, value in values.items() if value not in (None, "")}
            return cls.model_validate(given)
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            raise InputError(f"{name} must be {cls.model_fields[name].description}") from None

    @classmethod
    async def parse_json(cls, request: Request) -> "Fields":
        """Validates the JSON object in the body."""
        body, values = b"", None
        async for chunk in _read_chunks(request, MAX_JSON_BYTES):
            body += chunk
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(body)
        if not isinstance(values, dict):
            raise InputError("the request is not a JSON object")
        return cls.parse(values)


def serve(index: Index, host: str = "127.0.0.1", port: int = 7870, *, browse: bool = False) -> None:
    """Serves the page until Ctrl-C, or raises InputError if it cannot listen on the port.

    Args:
        index: an open index.
        host: name or address to listen on. There is no password: an address that other machines can
            reach is open to all of them.
        port: 0 for any free port.
        browse: True to open the page in this machine's browser.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}, port {port}: {error}") from error
    with listener:
        address, port = listener.getsockname()[:2]
        local = ipaddress.ip_address(address).is_loopback
        name = socket.gethostname() if host in ("0.0.0.0", "::") else host
        url = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
        print(f"{index.location}: {index.num_segments:,} segments of {index.num_files:,} files")
        if not local:
            print("no password: everyone who can reach this address can search and watch")
        print(f"search page: {url}  (stop with Ctrl-C)", flush=True)
        app = make_app(index, (*LOCAL_HOSTS, host) if local else ("*",))
        if browse:
            webbrowser.open(url)
        # `_handle_defect` logs errors. A video that is playing must not delay the shutdown.
        options: Any = {"log_level": "critical", "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(app, server_header=False, **options))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def make_app(index: Index, hosts: Sequence[str] = LOCAL_HOSTS) -> ASGIApp:
    """Returns the page and its JSON API for requests to one of the `hosts` ("*": any)."""
    api = _Api(index)
    handlers: dict[Any, Any] = {
        InputError: lambda _, error: JSONResponse({"error": str(error)}, 400),
        HTTPException: lambda _, error: JSONResponse({"error": error.detail}, error.status_code),
        ClientDisconnect: lambda *_: Response(status_code=400),  # never received
        Exception: _handle_defect,
    }
    app = Starlette(
        routes=[
            _file_route("/", "index.html"),
            _file_route("/style.css", "style.css"),
            _file_route("/page.js", "page.js"),
            Route("/api/index", api.get_facts),
            Route("/api/search", api.search, methods=["POST"]),
            Route("/api/example", api.search_example, methods=["POST"]),
            Route("/api/like/{id}", api.search_like),
            Route("/api/attention/{id}", api.get_attention, methods=["POST"]),
            Route("/thumbnail/{id}", api.get_picture),
            Route("/still/{id}", api.get_picture),
            Route("/video/{id}", api.get_video),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers=handlers,
        lifespan=api.keep_refreshed,
    )

    async def app_with_headers(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await app(scope, receive, send_with_headers)

    return app_with_headers


class _Api:
    """The endpoints that the page uses."""

    def __init__(self, index: Index) -> None:
        self.index = index
        # Separate limits, so that a page of pictures does not delay the next query.
        self.query_limiter, self.picture_limiter = map(anyio.CapacityLimiter, (2, 2))

    @contextlib.asynccontextmanager
    async def keep_refreshed(self, app: Starlette) -> AsyncIterator[None]:
        """Loads new versions of the index while the server runs."""

        async def refresh() -> None:
            duration = 0.0
            while True:  # loading a large index takes seconds: at most a tenth of the time
                await anyio.sleep(max(REFRESH_SECONDS, 10 * duration))
                start = time.perf_counter()
                try:
                    await run_sync(self.index.refresh, abandon_on_cancel=True)
                except Exception:  # a writer may be halfway through a commit: retried
                    logging.getLogger(__name__).exception("the index could not be refreshed")
                duration = time.perf_counter() - start

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(refresh)
            yield
            tasks.cancel_scope.cancel()

    async def get_facts(self, request: Request) -> Response:
        index, path = self.index, Path(self.index.model_name)
        model = path.parent.name if path.name == "model" else path.name
        sizes = {"segments": index.num_segments, "files": index.num_files}
        return JSONResponse({**sizes, "model": model, "max_upload_bytes": MAX_UPLOAD_BYTES})

    async def search(self, request: Request) -> Response:
        """Searches by a sentence: {text, k, path, start, end}."""
        fields = await Fields.parse_json(request)
        options = fields.model_dump(exclude={"second"})
        return await self._respond(partial(self.index.query, **options))

    async def search_example(self, request: Request) -> Response:
        """Searches by an image or video: its bytes in the body, ?name=its name&k=..."""
        fields = Fields.parse(request.query_params)
        options = fields.model_dump(exclude={"text", "second"})
        name = request.query_params.get("name", "")
        suffix = "".join(re.findall(r"\.[a-z0-9]{1,8}\Z", name.lower()))
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            async for chunk in _read_chunks(request, MAX_UPLOAD_BYTES):
                await run_sync(file.write, chunk)
            await run_sync(file.flush)
            try:
                return await self._respond(partial(self.index.similar, file.name, **options))
            except InputError as error:  # the user does not know the temporary name
                raise InputError(str(error).replace(file.name, name or "the file")) from error

    async def search_like(self, request: Request) -> Response:
        """Searches by a segment of the index: ?k=."""
        segment, k = await self._segment(request), Fields.parse(request.query_params).k
        return await self._respond(partial(self.index.like, segment.id, k), like=_describe(segment))

    async def _respond(self, search: Callable[[], Answer], **fields: Any) -> Response:
        answer = await run_sync(search, limiter=self.query_limiter)
        facts = {"hits": [_describe(hit) for hit in answer], "searched": answer.searched}
        times = {"seconds": sum(answer.seconds.values()), "stages": answer.seconds}
        return JSONResponse({**facts, "note": answer.note, **times, **fields})

    async def get_attention(self, request: Request) -> Response:
        """Returns the attention between the words of {text} and the frames of a segment."""
        segment, fields = await self._segment(request), await Fields.parse_json(request)
        compute = partial(self.index.attention, segment.id, fields.text)
        attention = await run_sync(compute, limiter=self.query_limiter)
        weights = {"weights": attention.weights_WxF.tolist()}
        return JSONResponse({"words": attention.words, "times": attention.times, **weights})

    async def get_picture(self, request: Request) -> Response:
        """Returns the picture at ?second=, or the stored one without it or if the file has none."""
        segment = await self._segment(request)
        second = Fields.parse(request.query_params).second

        def read() -> bytes:
            if second is not None:
                with contextlib.suppress(video.VideoError, OSError):
                    return video.read_still(segment.path, second, STILL_SIDE)
            return self.index.thumbnail(segment.id)

        jpeg = await run_sync(read, limiter=self.picture_limiter)
        return Response(jpeg, media_type="image/jpeg", headers=CACHED)

    async def get_video(self, request: Request) -> Response:
        """Returns the segment's file, or the byte ranges of it that a seeking player requests."""
        path = (await self._segment(request)).path
        exists = await run_sync(os.path.isfile, path)
        if not exists or not os.access(path, os.R_OK):
            reason = "cannot be read" if exists else "is no longer on disk"
            raise HTTPException(404, f"{os.path.basename(path)} {reason}")
        media_type = mimetypes.guess_type(path)[0] or ""
        if not media_type.startswith(("video/", "audio/")):  # a browser could show it as a web page
            media_type = "application/octet-stream"
        return FileResponse(path, media_type=media_type)

    async def _segment(self, request: Request) -> Hit:
        """Returns the segment of the id in the path, or raises HTTP 404."""
        try:
            return await run_sync(self.index.segment, request.path_params["id"])
        except KeyError:
            message = "this segment is not in the index, it may have been removed: search again"
            raise HTTPException(404, message) from None


async def _read_chunks(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """Yields the body in chunks, or raises HTTP 413 if it is larger than `max_bytes`."""
    declared, size = int(request.headers.get("content-length") or 0), 0
    async for chunk in request.stream():
        size += len(chunk)
        if max(size, declared) > max_bytes:
            raise HTTPException(413, f"more than {max_bytes / 2**20:,.0f} MB")
        yield chunk


def _file_route(path: str, name: str) -> Route:
    return Route(path, lambda _: FileResponse(PAGE / name, headers=REVALIDATED))


def _handle_defect(request: Request, error: Exception) -> Response:
    logging.getLogger(__name__).error("%s failed", request.url.path, exc_info=error)
    return JSONResponse({"error": "internal error; see the terminal of the server"}, 500)


def _describe(segment: Hit) -> dict[str, Any]:
    return {**dataclasses.asdict(segment), "name": os.path.basename(segment.path)}
