"""Protects the search server: hosts, origins, a token, time limits of connections."""

import asyncio
import collections
import secrets
from collections.abc import Sequence
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

# Host names of a local server. Without this check, a web site whose name resolves to this machine
# ("DNS rebinding") could read the index through its visitor's browser.
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
PAGES = ("/", "/docs")
COOKIE = "xclip_jax_token"
WRITE_SECONDS = 30  # in which a client must take some of a response: players then ask again
IDLE_SECONDS = 4  # in which a client must send the head of a request, or more of its body
MAX_WAITING = 256  # connections without a request; the oldest of more is closed


class Guard:
    """Middleware that passes on requests for one of the `hosts`, from its own pages, with a token.

    Args:
        app: the application.
        hosts: names or addresses without port that the Host header may have; "*": any.
        token: the secret that a request must have, as a cookie or as `Authorization: Bearer`;
            ?token= in the address of one of PAGES sets the cookie. None: no token.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], token: str | None = None) -> None:
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        refusal = self.refuse(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send_with_headers)

    def refuse(self, scope: Scope) -> Response | None:
        """Returns the response to a request that is not passed on, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = _host_name(host)
        if "*" not in self.hosts and name not in self.hosts:
            return _error(400, "this server has another name: see --allow_host")
        changes = scope["method"] not in ("GET", "HEAD")
        if changes and not self._is_own(headers.get("origin"), host):
            return _error(403, "requests from pages of other sites are refused")
        if self.token is None:
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if scope["path"] in PAGES and self._is_token(query.pop("token", [""])[0]):
            rest = urlencode(query, doseq=True)
            page = RedirectResponse(f"{scope['path']}?{rest}".removesuffix("?"), 303)
            page.set_cookie(COOKIE, quote(self.token, safe=""), httponly=True, samesite="strict")
            return page
        # Cookies of other programs on this host may be such that http.cookies reads none.
        pairs = (pair.strip().partition("=") for pair in headers.get("cookie", "").split(";"))
        cookie = next((value for name, _, value in pairs if name == COOKIE), "")
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(unquote(cookie)) or self._is_token(bearer):
            return None
        return _error(401, "open the address with ?token=... that the server printed")

    def _is_own(self, origin: str | None, host: str) -> bool:
        """Returns True if a page of this server sent the request, maybe through a proxy."""
        if origin is None:
            return True  # no browser
        netloc = origin.partition("://")[2]
        name = _host_name(netloc)
        return netloc == host or (name in self.hosts and name not in LOCAL_HOSTS)

    def _is_token(self, value: str) -> bool:
        return secrets.compare_digest(value.encode(), (self.token or "").encode())


def _host_name(host: str) -> str | None:
    """Returns the lower-case name or address of a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status, {"Connection": "close"})


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which closes connections that wait too long for a request's head."""

    waiting: ClassVar[collections.OrderedDict[Any, asyncio.TimerHandle]] = collections.OrderedDict()

    writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts waiting for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Stops waiting once the head of a request is complete."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Starts waiting for the next request."""
        super().on_response_complete()
        self._wait()

    def pause_writing(self) -> None:
        """Starts waiting for the client to take some of the response."""
        super().pause_writing()
        self.writing = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops waiting for the client."""
        super().resume_writing()
        if self.writing:
            self.writing.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops waiting."""
        self._stop_waiting()
        if self.writing:
            self.writing.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop_waiting()
        self.waiting[self] = self.loop.call_later(IDLE_SECONDS, self.stop)
        if len(self.waiting) > MAX_WAITING:
            next(iter(self.waiting)).stop()

    def _stop_waiting(self) -> None:
        if timer := self.waiting.pop(self, None):
            timer.cancel()

    def stop(self) -> None:
        """Closes the connection."""
        self._stop_waiting()
        self.transport.close()
