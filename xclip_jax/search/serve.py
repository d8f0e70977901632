"""Web server of the search page and of its API for other programs."""

import contextlib
import ipaddress
import logging
import resource
import secrets
import socket
import time
import webbrowser
from collections.abc import AsyncIterator, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import uvicorn
from anyio.to_thread import run_sync
from fastapi import FastAPI, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp

import xclip_jax
from xclip_jax.cli import InputError, PathLike
from xclip_jax.search.adding import Adder, check_folder
from xclip_jax.search.api import explain
from xclip_jax.search.endpoints import Endpoints
from xclip_jax.search.guard import IDLE_SECONDS, LOCAL_HOSTS, Guard, TimedProtocol
from xclip_jax.search.index import Index
from xclip_jax.search.readable import UnreadableError
from xclip_jax.search.searcher import Searcher
from xclip_jax.search.shards import UnavailableError

PAGE = Path(__file__).with_name("page")
SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")  # the page /docs, without a server elsewhere
REFRESH_SECONDS = 5
REVALIDATED = {"Cache-Control": "no-cache"}  # an updated page needs its updated script
DESCRIPTION = """Searches videos by what is seen, said or written.

All times are seconds after the first frame of a file. A refused request has the status 4xx and the
body `{"error": "one line"}`."""


def serve(
    index: Searcher,
    host: str = "127.0.0.1",
    port: int = 7870,
    *,
    allow_hosts: Sequence[str] = (),
    token: str | None = None,
    browse: bool = False,
    allow_add: PathLike | None = None,
    dedupe: bool = False,
) -> None:
    """Serves the page until Ctrl-C, or raises InputError if it cannot listen on the port.

    Raises InputError also if `allow_add` is not a folder in which files can be made.

    Args:
        index: an open index.
        host: name or address to listen on.
        port: 0 for any free port.
        allow_hosts: further names of this machine by which browsers may call it.
        token: secret that every request must have, "" for none; None: none if only this machine can
            reach the address, else a random one, which is printed.
        browse: True to open the page in this machine's browser.
        allow_add: folder in which videos that clients send are saved, to be indexed; None: refused.
        dedupe: True to fold near-duplicates where a request does not say.
    """
    folder = None if allow_add is None else check_folder("--allow_add", allow_add)
    with open_listener(host, port) as listener:
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
        names = (host, *_own_names(local), *allow_hosts)
        app = make_app(index, names, token, allow_add=folder, dedupe=dedupe)
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


def make_app(
    index: Searcher,
    hosts: Sequence[str] = LOCAL_HOSTS,
    token: str | None = None,
    *,
    allow_add: Path | None = None,
    dedupe: bool = False,
) -> ASGIApp:
    """Returns the page and its API, for requests that `Guard` allows. See `serve`."""
    adder = Adder(index, allow_add) if allow_add is not None and isinstance(index, Index) else None
    endpoints = Endpoints(index, adder, dedupe=dedupe)
    handlers: dict[Any, Any] = {
        UnavailableError: lambda _, error: _refuse(503, str(error)),
        UnreadableError: lambda _, error: _refuse(503, str(error)),
        InputError: lambda _, error: _refuse(400, str(error)),
        RequestValidationError: lambda _, error: _refuse(400, explain(error.errors()[0])),
        HTTPException: lambda _, error: _refuse(error.status_code, error.detail, error.headers),
        ClientDisconnect: lambda *_: Response(status_code=400),  # never received
        Exception: _handle_defect,
    }
    app = FastAPI(
        title="xclip_jax search",
        description=DESCRIPTION,
        version=xclip_jax.__version__,
        docs_url=None,  # these pages would load scripts from elsewhere: see docs.html
        redoc_url=None,
        lifespan=lambda _: _run_beside(endpoints),
        exception_handlers=handlers,
    )
    bearer = HTTPBearer(auto_error=False, description="The token that the server printed.")
    dependencies = [Security(bearer)] if token else []  # described only: `Guard` checks it
    app.include_router(endpoints.make_router(), dependencies=dependencies)
    _add_files(app)
    return Guard(app, hosts, token)


def _add_files(app: FastAPI) -> None:
    """Adds the routes of the page and of the API's description."""
    swagger = Path(str(files("fastapi_offline"))) / "static"
    paths = {f"/docs/{name}": swagger / name for name in SWAGGER}
    for path in PAGE.iterdir():
        address = {"index.html": "/", "docs.html": "/docs"}.get(path.name, f"/{path.name}")
        paths[address] = path
    for address, path in paths.items():
        send = partial(FileResponse, path, headers=REVALIDATED)
        app.add_route(address, lambda _, send=send: send(), include_in_schema=False)


@contextlib.asynccontextmanager
async def _run_beside(endpoints: Endpoints) -> AsyncIterator[None]:
    """Loads new versions of the index, and adds videos, while the server runs."""

    async def refresh() -> None:
        duration, reported = 0.0, ""
        while True:  # loading a large index takes seconds: at most a tenth of the time
            await anyio.sleep(max(REFRESH_SECONDS, 10 * duration))
            start = time.perf_counter()
            try:
                await run_sync(endpoints.index.refresh, abandon_on_cancel=True)
            except InputError as error:  # a writer may be halfway through a commit: retried
                if (problem := str(error)) != reported:
                    logging.getLogger(__name__).error("no new version is loaded: %s", problem)
                reported = problem
            except Exception:
                logging.getLogger(__name__).exception("the index could not be refreshed")
            else:
                reported = ""
            duration = time.perf_counter() - start

    if endpoints.adder:
        endpoints.adder.start()
    with contextlib.closing(endpoints.exports):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(refresh)
            yield
            tasks.cancel_scope.cancel()


def open_listener(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on a port, or raises InputError. See `serve`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}, port {port}: {error}") from error


def _refuse(status: int, message: str, headers: Any = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


def _handle_defect(request: Request, error: Exception) -> Response:
    logging.getLogger(__name__).error("%s failed", request.url.path, exc_info=error)
    return _refuse(500, "internal error; see the terminal of the server")
