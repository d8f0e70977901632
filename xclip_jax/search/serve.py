"""The search page: a web server over an index, for one machine or for the people around it.

Files are asked for by the id of a segment that the index holds: no path ever comes from a client.
What touches the index or a file runs in threads, a few at once, so that every request is answered.
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
from functools import partial
from pathlib import Path

import anyio
import uvicorn
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from xclip_jax.cli import InputError
from xclip_jax.data import video
from xclip_jax.search.requests import (
    asked_json,
    chunks_of,
    count_of,
    options_of,
    seconds_of,
    suffix_of,
    text_of,
)

PAGE = Path(__file__).with_name("page")
MOST_UPLOADED = 500 * 2**20  # bytes of an example
STILL_SIDE = 480  # pixels, the longer side
REFRESH_EVERY = 5  # seconds
# Names under which this machine reaches itself. Without the check, a web site whose name is made to
# point here ("DNS rebinding") could read the index through its visitor's browser.
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# A segment's pictures and file do not change under its id as long as someone looks at a page.
KEEP = {"Cache-Control": "private, max-age=3600"}


def serve(index, host="127.0.0.1", port=7870, open_page=False):
    """Serves the page until Ctrl-C.

    Args:
      index: an open index.
      host: name or address to listen on; one of other machines too is open to all who reach it.
      port: 0 is any free one.
      open_page: whether to show the page in this machine's browser.

    Raises:
      InputError: it cannot listen there, for instance because the port is in use.
    """
    with _listen(host, port) as listener:
        local = _is_loopback(host)
        address = _address(host, listener.getsockname()[1])
        print(f"{index.location}: {index.num_segments:,} segments of {index.num_files:,} files")
        if not local:
            print("no password: whoever can reach this address can search and watch")
        print(f"search page: {address}  (Ctrl-C ends it)", flush=True)
        app = make_app(index, (*LOOPBACK, host) if local else ("*",))
        # Defects are logged by `_defect`; a video that still plays must not hold up the end.
        options = {"log_level": "critical", "timeout_graceful_shutdown": 1, "server_header": False}
        if open_page:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listener])


def make_app(index, hosts=LOOPBACK):
    """The page and its JSON as an ASGI application.

    Args:
      index: an open index.
      hosts: names that a request's Host header may give; "*" is any.
    """
    pages = _Routes(index)
    errors = {
        InputError: lambda _, error: _refusal(400, str(error)),
        HTTPException: lambda _, error: _refusal(error.status_code, error.detail),
        ClientDisconnect: lambda *_: Response(status_code=400),  # nobody reads it
        Exception: _defect,
    }
    middleware = [
        Middleware(_SafeHeaders),
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
    ]
    return Starlette(
        routes=[*_page_routes(), *pages.routes()],
        middleware=middleware,
        exception_handlers=errors,
        lifespan=pages.refreshing,
    )


class _Routes:
    """What the page asks for."""

    def __init__(self, index):
        self.index = index
        # Apart, so that a page of pictures does not keep the next query waiting.
        self.for_queries, self.for_pictures = anyio.CapacityLimiter(2), anyio.CapacityLimiter(2)

    def routes(self):
        return [
            Route("/api/index", self.facts),
            Route("/api/search", self.search, methods=["POST"]),
            Route("/api/example", self.example, methods=["POST"]),
            Route("/api/like/{id}", self.like),
            Route("/api/attention/{id}", self.attention, methods=["POST"]),
            Route("/thumbnail/{id}", self.thumbnail),
            Route("/still/{id}", self.still),
            Route("/video/{id}", self.file),
        ]

    @contextlib.asynccontextmanager
    async def refreshing(self, app):
        """Takes in what a writer adds to the index for as long as the server runs."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._refresh)
            yield
            tasks.cancel_scope.cancel()

    async def _refresh(self):
        took = 0
        while True:  # a large index takes seconds to load, which must not be all that is done
            await anyio.sleep(max(REFRESH_EVERY, 10 * took))
            start = time.perf_counter()
            try:
                await run_sync(self.index.refresh, abandon_on_cancel=True)
            except Exception:  # such as a writer halfway through; the next time may be better
                logging.getLogger(__name__).exception("the index could not be refreshed")
            took = time.perf_counter() - start

    async def facts(self, request):
        """What is searched, for someone who has not asked for anything yet."""
        counts = {"segments": self.index.num_segments, "files": self.index.num_files}
        path = Path(self.index.model_name)
        model = {"model": path.parent.name if path.name == "model" else path.name}
        return JSONResponse({**counts, **model, "most_uploaded": MOST_UPLOADED})

    async def search(self, request):
        """{text, k, path, start, end} -> hits for a sentence."""
        asked = await asked_json(request)
        query = partial(self.index.query, text_of(asked, "text"), **options_of(asked))
        return await self._answer(query)

    async def example(self, request):
        """An image's or video's bytes as the body, ?name=its name&k=... -> hits like it."""
        where, name = options_of(request.query_params), request.query_params.get("name", "")
        with tempfile.NamedTemporaryFile(suffix=suffix_of(name)) as file:
            async for chunk in chunks_of(request, MOST_UPLOADED):
                await run_sync(file.write, chunk)
            await run_sync(file.flush)
            try:
                return await self._answer(partial(self.index.similar, file.name, **where))
            except InputError as error:  # the user knows the file by another name
                raise InputError(str(error).replace(file.name, name or "the file")) from error

    async def like(self, request):
        """?k= -> hits like a segment of the index."""
        segment = await self._segment(request)
        query = partial(self.index.like, segment.id, count_of(request.query_params))
        return await self._answer(query, like=_shown(segment))

    async def _answer(self, query, **more):
        answer, seconds = await run_sync(_timed, query, limiter=self.for_queries)
        hits = [_shown(hit) | _found(hit) for hit in answer.hits]
        spent = {"seconds": seconds, "stages": answer.seconds}
        facts = {"searched": answer.searched, "note": answer.note}
        return JSONResponse({"hits": hits, **facts, **spent, **more})

    async def attention(self, request):
        """{text} -> how the sentence's words look at the segment's frames."""
        segment, asked = await self._segment(request), await asked_json(request)
        look = partial(self.index.attention, segment.id, text_of(asked, "text"))
        seen = await run_sync(look, limiter=self.for_queries)
        weights = seen.weights_WxF.tolist()
        return JSONResponse({"words": seen.words, "times": seen.times, "weights": weights})

    async def thumbnail(self, request):
        """The segment's stored picture."""
        segment = await self._segment(request)
        return await self._picture(partial(self.index.thumbnail, segment.id))

    async def still(self, request):
        """?second= -> the picture at that second; the stored one where the file gives none."""
        segment = await self._segment(request)
        second = seconds_of(request.query_params, "second") or 0.0
        return await self._picture(partial(self._still, segment, second))

    def _still(self, segment, second):
        try:
            return video.still(segment.path, second, STILL_SIDE)
        except (video.VideoError, OSError):
            return self.index.thumbnail(segment.id)

    async def _picture(self, read):
        data = await run_sync(read, limiter=self.for_pictures)
        return Response(data, media_type="image/jpeg", headers=KEEP)

    async def file(self, request):
        """The segment's whole file; byte ranges, which seeking needs, are FileResponse's work."""
        segment = await self._segment(request)
        status = await run_sync(_readable, segment.path)
        return FileResponse(segment.path, media_type=_media_type(segment.path), stat_result=status)

    async def _segment(self, request):
        """The segment that a request's id names, or 404."""
        asked = request.path_params["id"]
        try:
            if re.fullmatch("[0-9a-f]{16}", asked):
                return await run_sync(self.index.segment, asked)
        except KeyError:
            pass
        raise HTTPException(404, "this segment is not in the index (any more): search again")


class _SafeHeaders:
    """Puts HEADERS on every response."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_safe(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_safe)


def _page_routes():
    names = {"/": "index.html", "/style.css": "style.css", "/page.js": "page.js"}
    fresh = {"Cache-Control": "no-cache"}  # the page of a new version with its own script

    def route(path, name):
        return Route(path, lambda _: FileResponse(PAGE / name, headers=fresh))

    return [route(path, name) for path, name in names.items()]


def _refusal(status, message):
    return JSONResponse({"error": message}, status)


def _defect(request, error):
    logging.getLogger(__name__).error("%s failed", request.url.path, exc_info=error)
    message = "something went wrong here; the terminal of the server says what"
    return JSONResponse({"error": message}, 500, HEADERS)  # made outside of the middleware


def _timed(query):
    start = time.perf_counter()
    answer = query()
    return answer, time.perf_counter() - start


def _shown(segment):
    """What a page may know of a segment; bytes of a file name that are no text become '�'."""
    path = os.fsencode(segment.path).decode("utf-8", "replace")
    where = {"path": path, "name": os.path.basename(path)}
    return {"id": segment.id, **where, "start": segment.start, "end": segment.end}


def _found(hit):
    return {"rank": hit.rank, "score": hit.score, "second": hit.second}


def _readable(path):
    """The status of a file that can be sent, or 404."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            open(path, "rb").close()  # now, not after the response has begun
            return status
        reason = "is not a file any more"
    except FileNotFoundError:
        reason = "is no longer on disk"
    except OSError:
        reason = "cannot be read"
    raise HTTPException(404, f"{os.path.basename(path)} {reason}")


def _media_type(path):
    """Never one that a browser would show as a page of this server."""
    guess = mimetypes.guess_type(path)[0] or ""
    return guess if guess.startswith(("video/", "audio/")) else "application/octet-stream"


def _listen(host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host}, port {port}: {reason}") from error


def _is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host, port):
    host = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
