"""Web server of the search page.

Files are requested by the id of a segment: no path comes from a client. Work on the index and on
files runs in a few threads, so that other requests are still handled.
"""

import contextlib
import dataclasses
import ipaddress
import json
import logging
import os
import re
import resource
import secrets
import socket
import tempfile
import time
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import anyio
import uvicorn
from anyio.to_thread import run_sync
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from xclip_jax.cli import InputError
from xclip_jax.data import video
from xclip_jax.data.container import VideoError
from xclip_jax.search.funnel import Answer, Hit
from xclip_jax.search.guard import IDLE_SECONDS, LOCAL_HOSTS, Guard, TimedProtocol
from xclip_jax.search.index import MAX_SENTENCE, Index
from xclip_jax.search.snapshot import MAX_PATH

PAGE = Path(__file__).with_name("page")
MAX_HITS, MAX_JSON_BYTES, MAX_UPLOAD_BYTES = 100, 2**17, 500 * 2**20
MAX_UPLOADS, UPLOAD_SECONDS = 4, 600  # at once, and the longest time of one
MIN_BYTES_A_SECOND = 2**15  # of a request's body, after the first seconds
STILL_SIDE = 480  # pixels, the longer side
REFRESH_SECONDS = 5
CLOSE = {"Connection": "close"}  # the rest of the request is not read
# What browsers may play. The host's own table might call a video a web page.
MEDIA_TYPES = {".mp4": "mp4", ".m4v": "mp4", ".mov": "quicktime", ".qt": "quicktime"}
MEDIA_TYPES |= {".webm": "webm", ".mkv": "x-matroska", ".ogv": "ogg", ".ogg": "ogg"}
MEDIA_TYPES |= {".avi": "x-msvideo", ".mpg": "mpeg", ".mpeg": "mpeg", ".ts": "mp2t"}
CACHED = {"Cache-Control": "private, max-age=3600"}  # the pictures of an id do not change
REVALIDATED = {"Cache-Control": "no-cache"}  # an updated page needs its updated script
_RULE = "a number of seconds, at least 0"
Seconds = Annotated[float | None, Field(ge=0, allow_inf_nan=False, description=_RULE)]


def _limit_length(limit: int, text: str) -> str:
    if len(text) > limit:
        raise ValueError
    return re.sub("[\ud800-\udfff]", "\ufffd", text)  # JSON allows lone surrogates


Sentence = Annotated[str, AfterValidator(partial(_limit_length, MAX_SENTENCE))]
PathFilter = Annotated[str, AfterValidator(partial(_limit_length, MAX_PATH))]
_LENGTH = "a string of at most {:,} characters"


class Fields(BaseModel):
    """The fields of a request (see `Index.query`), with descriptions that errors quote."""

    text: Sentence = Field("", description=_LENGTH.format(MAX_SENTENCE))
    path: PathFilter | None = Field(None, description=_LENGTH.format(MAX_PATH))
    k: int = Field(12, ge=1, le=MAX_HITS, description=f"between 1 and {MAX_HITS}")
    start: Seconds = None
    end: Seconds = None
    second: Seconds = None  # of a picture

    def filters(self) -> dict[str, Any]:
        """Returns `k` and the fields of `Filters`."""
        return self.model_dump(exclude={"text", "second"})

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


def serve(
    index: Index,
    host: str = "127.0.0.1",
    port: int = 7870,
    *,
    allow_hosts: Sequence[str] = (),
    token: str | None = None,
    browse: bool = False,
) -> None:
    """Serves the page until Ctrl-C, or raises InputError if it cannot listen on the port.

    Args:
        index: an open index.
        host: name or address to listen on.
        port: 0 for any free port.
        allow_hosts: further names of this machine by which browsers may call it.
        token: secret that every request must have, "" for none; None: none if only this machine can
            reach the address, else a random one, which is printed.
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
        token = secrets.token_urlsafe(16) if token is None and not local else token or None
        if token:
            url += f"/?token={quote(token, safe='')}"
        elif not local:
            print("no token: everyone who can reach this address can search and watch")
        print(f"search page: {url}  (stop with Ctrl-C)", flush=True)
        app = make_app(index, (host, *_own_names(local), *allow_hosts), token)
        if browse:
            webbrowser.open(url)
        # `_handle_defect` logs errors. A video that is playing must not delay the shutdown.
        options: Any = {"log_level": "critical", "timeout_graceful_shutdown": 1}
        options |= {"http": TimedProtocol, "timeout_keep_alive": IDLE_SECONDS}
        # Open connections, players among them, count against the soft limit (often 1,024).
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS has no number for "no limit"
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        server = uvicorn.Server(uvicorn.Config(app, server_header=False, **options))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def _own_names(local: bool) -> list[str]:
    """Returns the names and addresses of this machine."""
    if local:
        return list(LOCAL_HOSTS)
    name = socket.gethostname()
    addresses: list[str] = []
    with contextlib.suppress(OSError):
        addresses = [str(info[4][0]) for info in socket.getaddrinfo(name, None)]
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as other:
            other.connect((elsewhere, 9))  # chooses an address of this machine, sends nothing
            addresses.append(other.getsockname()[0])
    return [*LOCAL_HOSTS, name.lower(), socket.getfqdn().lower(), *addresses]


def make_app(index: Index, hosts: Sequence[str] = LOCAL_HOSTS, token: str | None = None) -> ASGIApp:
    """Returns the page and its JSON API, for requests that `Guard` allows."""
    api = _Api(index)
    handlers: dict[Any, Any] = {
        InputError: lambda _, error: JSONResponse({"error": str(error)}, 400),
        HTTPException: lambda _, error: JSONResponse(
            {"error": error.detail}, error.status_code, error.headers
        ),
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
        exception_handlers=handlers,
        lifespan=api.keep_refreshed,
    )
    return Guard(app, hosts, token)


class _Api:
    """The endpoints that the page uses."""

    def __init__(self, index: Index) -> None:
        self.index = index
        # Separate limits, so that a page of pictures does not delay the next query.
        # Examples have one of their own: nor do they.
        self.query_limiter, self.picture_limiter = map(anyio.CapacityLimiter, (2, 2))
        self.example_limiter, self.uploads = anyio.CapacityLimiter(1), anyio.Semaphore(MAX_UPLOADS)

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
        search = partial(self.index.query, fields.text, **fields.filters())
        return await self._respond(search, self.query_limiter)

    async def search_example(self, request: Request) -> Response:
        """Searches by an image or video: its bytes in the body, ?name=its name&k=..."""
        fields = Fields.parse(request.query_params)
        options = fields.filters()
        name = request.query_params.get("name", "")
        suffix = "".join(re.findall(r"\.[a-z0-9]{1,8}\Z", name.lower()))
        with self._upload(), tempfile.NamedTemporaryFile(suffix=suffix) as file:
            async for chunk in _read_chunks(request, MAX_UPLOAD_BYTES):
                await run_sync(file.write, chunk)
            await run_sync(file.flush)
            try:
                search = partial(self.index.similar, file.name, **options)
                return await self._respond(search, self.example_limiter)
            except InputError as error:  # the user does not know the temporary name
                raise InputError(str(error).replace(file.name, name or "the file")) from error

    @contextlib.contextmanager
    def _upload(self) -> Iterator[None]:
        """Occupies one of the MAX_UPLOADS, or raises HTTP 503."""
        try:
            self.uploads.acquire_nowait()
        except anyio.WouldBlock:
            raise HTTPException(503, "too many uploads at once: try again later", CLOSE) from None
        try:
            yield
        finally:
            self.uploads.release()

    async def search_like(self, request: Request) -> Response:
        """Searches by a segment of the index: ?k=, path, start, end."""
        segment, fields = await self._segment(request), Fields.parse(request.query_params)
        search = partial(self.index.like, segment.id, **fields.filters())
        return await self._respond(search, self.query_limiter, like=_describe(segment))

    async def _respond(
        self, search: Callable[[], Answer], limiter: anyio.CapacityLimiter, **fields: Any
    ) -> Response:
        answer = await run_sync(search, limiter=limiter)
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
                with contextlib.suppress(VideoError, OSError):
                    path = self.index.find_file(segment.id)
                    return video.read_still(path, second, STILL_SIDE)
            return self.index.thumbnail(segment.id)

        jpeg = await run_sync(read, limiter=self.picture_limiter)
        return Response(jpeg, media_type="image/jpeg", headers=CACHED)

    async def get_video(self, request: Request) -> Response:
        """Returns the segment's file, or the byte ranges of it that a seeking player requests."""
        segment = await self._segment(request)
        try:
            path = await run_sync(self.index.find_file, segment.id)
        except OSError as error:
            raise HTTPException(404, str(error)) from None
        kind = MEDIA_TYPES.get(os.path.splitext(path)[1].lower())
        media_type = f"video/{kind}" if kind else "application/octet-stream"
        return FileResponse(path, media_type=media_type)

    async def _segment(self, request: Request) -> Hit:
        """Returns the segment of the id in the path, or raises HTTP 404."""
        try:
            return await run_sync(self.index.segment, request.path_params["id"])
        except KeyError:
            message = "this segment is not in the index, it may have been removed: search again"
            raise HTTPException(404, message) from None


async def _read_chunks(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """Yields the body in chunks.

    Raises HTTP 413 if it is larger than `max_bytes`, 408 if the client stops sending or sends less
    than MIN_BYTES_A_SECOND.
    """
    declared, size, chunks = int(request.headers.get("content-length") or 0), 0, request.stream()
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


def _file_route(path: str, name: str) -> Route:
    return Route(path, lambda _: FileResponse(PAGE / name, headers=REVALIDATED))


def _handle_defect(request: Request, error: Exception) -> Response:
    logging.getLogger(__name__).error("%s failed", request.url.path, exc_info=error)
    return JSONResponse({"error": "internal error; see the terminal of the server"}, 500)


def _describe(segment: Hit) -> dict[str, Any]:
    return {**dataclasses.asdict(segment), "name": os.path.basename(segment.path)}
