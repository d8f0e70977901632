"""Tests of what protects the search server: tokens, origins, addresses, time limits."""

import contextlib
import socket
import threading
import time
from urllib.parse import quote

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from xclip_jax.search import guard, serve
from xclip_jax.search.guard import Guard, TimedProtocol


def make_client(*hosts, token=None):
    """Returns a client of an application that answers every request."""
    routes = [Route("/{path:path}", lambda _: PlainTextResponse("ok"), methods=["GET", "POST"])]
    app = Guard(Starlette(routes=routes), ("testserver", *hosts), token)
    return TestClient(app, follow_redirects=False)


def test_token_is_required_of_every_request():
    client = make_client(token="secret")
    for path in ("/", "/page.js", "/api/index", "/?token=wrong"):
        assert client.get(path).status_code == 401
    assert client.get("/api/index", headers={"Authorization": "Bearer secret"}).status_code == 200
    entered = client.get("/?token=secret")
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    assert "httponly" in entered.headers["set-cookie"].lower()
    assert client.get("/api/index").status_code == 200  # with the cookie
    for other in ('theme={"a":1}', "flag", "a[b]=1", "x y=1", "path=/"):  # of other programs
        client.cookies.clear()
        cookies = {"Cookie": f"{other}; {guard.COOKIE}=secret"}
        assert client.get("/api/index", headers=cookies).status_code == 200


@pytest.mark.parametrize(
    ("address", "location"),
    [
        ("/docs?token=secret", "/docs"),
        ("/?q=a+dog&token=secret&in=speech", "/?q=a+dog&in=speech"),
        ("/?token=secret&next=//evil.example", "/?next=%2F%2Fevil.example"),
    ],
)
def test_token_is_removed_from_the_address(address, location):
    response = make_client(token="secret").get(address)
    assert (response.status_code, response.headers["location"]) == (303, location)


def test_token_in_the_address_opens_pages_only():
    client = make_client(token="secret")
    for path in ("/api/index", "/openapi.json", "/docs/x"):
        assert client.get(f"{path}?token=secret").status_code == 401


def test_any_token_can_be_used():
    token = "p&q +\u00e9;"
    client = make_client(token=token)
    assert client.get(f"/?token={quote(token, safe='')}").status_code == 303
    assert client.get("/api/index").status_code == 200


@pytest.mark.parametrize(("name", "status"), [("search.example", 200), ("evil.example", 403)])
def test_origin_behind_a_proxy_is_allowed_by_name(name, status):
    headers = {"Host": "testserver:7870", "Origin": f"https://{name}"}
    response = make_client("search.example").post("/api/search", headers=headers)
    assert response.status_code == status


def test_server_for_all_has_this_machines_addresses():
    names = serve._own_names(local=False)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        try:
            other.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        assert other.getsockname()[0] in names


def test_client_that_takes_nothing_is_disconnected(monkeypatch):
    monkeypatch.setattr(guard, "WRITE_SECONDS", 0.5)

    async def chunks():
        for _ in range(1000):
            yield bytes(2**20)

    app = Starlette(routes=[Route("/", lambda _: StreamingResponse(chunks()))])
    server = uvicorn.Server(uvicorn.Config(app, http=TimedProtocol, log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        with socket.create_connection(listener.getsockname(), 30) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(3)
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while data := client.recv(2**20):
                    received += len(data)
            assert 0 < received < 2**28
        server.should_exit = True
        thread.join(30)
