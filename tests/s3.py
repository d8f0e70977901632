"""A stand-in for S3 on this machine, by moto, which counts requests.

A test that takes the fixture `s3` gets a bucket of its own and the environment variables with which
pyarrow, LanceDB and boto3 reach it:

    from s3 import s3

    __all__ = ["s3"]  # the fixture

    def test_reads_one_range(s3):
        s3.write("folder/a.bin", bytes(1000))
        s3.requests.clear()
        ...  # reads f"{s3.uri}/folder/a.bin"
        assert s3.requests == [("GET", "/bucket-1/folder/a.bin", "bytes=0-9")]

Without moto and flask such tests are skipped. Fixtures of a wider scope call
`make_bucket()` and set its `environment` themselves.
"""

import collections
import dataclasses
import functools
import itertools
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

XMLNS = "{http://s3.amazonaws.com/doc/2006-03-01/}"
_numbers = itertools.count(1)
Request = tuple[str, str, str | None]  # method, path (unquoted, without query), Range header


@dataclasses.dataclass
class Bucket:
    """A bucket of the stand-in.

    `requests` lists the requests since its last `clear()`, except those of the methods below.
    `hook`, if set, is called with (method, path) of each request before it is handled. A number
    that it returns is the status of the response, and the request is not handled.
    """

    name: str
    environment: dict[str, str]
    _client: Any
    requests: list[Request] = dataclasses.field(default_factory=list)
    hook: Callable[[str, str], int | None] | None = None

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    def count(self, method: str = "GET", within: str = "") -> int:
        """Returns the number of requests of a method whose path contains a text."""
        return sum(m == method and within in path for m, path, _ in self.requests)

    def counts(self) -> dict[str, int]:
        """Returns {method: number of requests}."""
        return dict(collections.Counter(method for method, _, _ in self.requests))

    def keys(self, prefix: str = "") -> list[str]:
        """Returns the keys of all objects that start with a prefix, sorted."""
        keys, query = [], {"list-type": "2", "prefix": prefix}
        while True:
            response = self._send("GET", query_string=query)
            page = ElementTree.fromstring(response.data)
            keys += [key.text or "" for key in page.iter(f"{XMLNS}Key")]
            token = page.findtext(f"{XMLNS}NextContinuationToken")
            if token is None:
                return sorted(keys)
            query["continuation-token"] = token

    def read(self, key: str) -> bytes:
        """Returns the content of an object, or raises KeyError."""
        response = self._send("GET", key)
        if response.status_code != 200:
            raise KeyError(key)
        return response.data

    def write(self, key: str, content: bytes) -> None:
        """Writes an object."""
        assert self._send("PUT", key, data=content).status_code == 200

    def delete(self, key: str) -> None:
        """Deletes an object."""
        assert self._send("DELETE", key).status_code == 204

    def upload(self, folder: Path, prefix: str) -> None:
        """Writes all files of a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.write(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Returns {path below the prefix: content}, without the empty objects that mark folders."""
        keys = [key for key in self.keys(f"{prefix}/") if not key.endswith("/")]
        return {key.removeprefix(f"{prefix}/"): self.read(key) for key in keys}

    def _send(self, method: str, key: str = "", **options: Any) -> Any:
        """Sends a request that is not recorded, signed as if with the keys of `environment`."""
        path = f"/{self.name}/{urllib.parse.quote(key)}".rstrip("/")
        headers = {"Authorization": "AWS test:signature"}  # moto refuses an unsigned GET
        return self._client.open(path, method=method, headers=headers, **options)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Makes an empty bucket and sets the environment variables to reach it."""
    bucket = make_bucket()
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    return bucket


def make_bucket() -> Bucket:
    """Returns a new bucket, or skips the test if moto is not installed."""
    pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    application, port, buckets = _start_server()
    werkzeug_test = pytest.importorskip("werkzeug.test")
    client = werkzeug_test.Client(application)
    name = f"bucket-{next(_numbers)}"
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT": f"http://127.0.0.1:{port}",  # LanceDB reads this name, boto3 the next
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    assert client.put(f"/{name}").status_code == 200
    buckets[name] = Bucket(name, environment, client)
    return buckets[name]


@functools.cache
def _start_server() -> tuple[Any, int, dict[str, Bucket]]:
    """Starts the server in threads of this process.

    Returns (the WSGI application, port, {name: bucket whose requests are recorded}).
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections open, as S3 does

        def log(self, *_: Any) -> None:
            """Prints nothing."""

    application = DomainDispatcherApplication(create_backend_app)
    buckets: dict[str, Bucket] = {}

    def record(environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        path = path.encode("latin-1").decode()  # WSGI passes bytes as Latin-1
        bucket, status = buckets.get(path.strip("/").partition("/")[0]), None
        if bucket is not None:
            bucket.requests.append((method, path, environ.get("HTTP_RANGE")))
            status = bucket.hook(method, path) if bucket.hook else None
        if status is None:
            return application(environ, start_response)
        start_response(f"{status} Refused", [("Content-Length", "0")])
        return []

    server = make_server("127.0.0.1", 0, record, threaded=True, request_handler=Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return application, server.port, buckets
