"""Tests of the search server under attack: it refuses within seconds, and still answers."""

import contextlib
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
from PIL import Image
from video_files import grey, write

from xclip_jax.search import Index, indexing

LIMIT = 5  # seconds until a request is refused
TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Starts a server of two clips, returns (port, process, folder of the clips)."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "videos").mkdir()
    tiny.make_videos(folder / "videos", 2)
    index = Index.create(folder / "index", tiny.make_model(folder / "model"), segment_seconds=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "run_jobs", tiny.run_jobs_here)
        index.add([folder / "videos"])
    command = ["-m", "xclip_jax.search", "serve", f"--index={folder / 'index'}", "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, *command], cwd=TESTS.parent, **pipes) as process:
        try:
            lines = [process.stdout.readline() for _ in range(2)]
            port = int(lines[1].split("http://127.0.0.1:")[1].split()[0])
            yield port, process, folder / "videos"
        finally:
            process.kill()


def request(port, method, path, body=None, headers=(), timeout=30):
    """Returns (status, body) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def query(port):
    """Returns the seconds that a text query takes."""
    started = time.monotonic()
    status, body = request(port, "POST", "/api/search", json.dumps({"text": "a red dog"}))
    assert status == 200, body
    assert json.loads(body)["hits"]
    return time.monotonic() - started


def receive(connection):
    """Returns what the server sends, b"" if it only closes the connection."""
    try:
        return connection.recv(100)
    except ConnectionResetError:
        return b""


def memory(process, field):
    """Returns a field of the process's status (VmRSS, VmHWM) in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def many_scans():
    """Returns a progressive JPEG of 4,000 x 4,000 pixels whose last scan occurs 5,000 times."""
    buffer = io.BytesIO()
    Image.new("L", (4000, 4000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 5000 + data[-2:]


def huge_picture(path):
    """Writes a video with one frame of 12,000 x 12,000 pixels, which take little space."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=1, options={"strict": "unofficial"})
        stream.width = stream.height = 12_000
        stream.pix_fmt = "yuvj420p"
        frame = av.VideoFrame(12_000, 12_000, "yuvj420p")
        for plane in frame.planes:
            plane.update(np.full(plane.buffer_size, 90, np.uint8))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """Makes {name: bytes} of example files that must be refused."""
    folder = tmp_path_factory.mktemp("bombs")
    times = [Fraction(3500 * number) for number in range(300)]
    return {
        "huge.png": encoded(Image.new("L", (20_000, 20_000)), "PNG"),
        "huge.jpg": encoded(Image.new("L", (20_000, 20_000)), "JPEG"),
        "picture.mkv": huge_picture(folder / "picture.mkv"),
        "scans.jpg": many_scans(),
        "wide.png": encoded(Image.new("L", (1_000_000, 1)), "PNG"),
        "tall.png": encoded(Image.new("L", (1, 1_000_000)), "PNG"),
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n",
        "concat.mp4": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        "hls.mp4": b"#EXTM3U\n#EXTINF:10,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        "sparse.mkv": write(folder / "a.mkv", times, [grey(9)] * 300).read_bytes(),
    }


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_bombs_take_neither_time_nor_memory(server, bombs):
    port, process, _ = server
    query(port)
    small = encoded(Image.new("RGB", (64, 48), "red"), "PNG")
    assert request(port, "POST", "/api/example?name=a.png", small)[0] == 200
    idle = memory(process, "VmRSS")
    for name, data in bombs.items():
        with ThreadPoolExecutor(2) as pool:
            started = time.monotonic()
            answers = [
                pool.submit(request, port, "POST", f"/api/example?name={name}", data)
                for _ in range(2)
            ]
            assert query(port) < 2, name
            statuses = [answer.result()[0] for answer in answers]
        assert time.monotonic() - started < LIMIT, name
        harmless = ("sparse.mkv", "wide.png", "tall.png")
        assert statuses == [200 if name in harmless else 400] * 2, name
    assert memory(process, "VmHWM") < 1.5 * idle


def test_half_open_connections_and_unfinished_uploads_are_closed(server):
    port, _, _ = server
    half_open = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(500)]
    for number, connection in enumerate(half_open):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: loc" if number % 2 else b"")
    head = (
        b"POST /api/example?name=a.mp4 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
    )
    uploads = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(50)]
    started = time.monotonic()
    for connection in uploads:
        connection.sendall(head + b"some")
    stop, slowest = threading.Event(), []

    def ask():
        while not stop.is_set():
            slowest.append(query(port))

    asking = threading.Thread(target=ask)
    asking.start()
    answers = [receive(connection) for connection in uploads]
    assert time.monotonic() - started < LIMIT + 1
    for connection in half_open:
        assert not receive(connection)  # closed, without an answer
    assert time.monotonic() - started < LIMIT + 1
    stop.set()
    asking.join()
    for connection in [*uploads, *half_open]:
        connection.close()
    assert {answer.split()[1] for answer in answers if answer} == {b"408", b"503"}
    assert max(slowest) < 2


def test_dripping_body_is_refused(server):
    port, _, _ = server
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        head = b"POST /api/example?name=a.mp4 HTTP/1.1\r\nHost: localhost\r\n"
        connection.sendall(head + b"Content-Length: 999\r\n\r\n")
        connection.settimeout(0.2)
        started, answer = time.monotonic(), b""
        while not answer and time.monotonic() - started < 3 * LIMIT:
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(100)
            if not answer:
                connection.sendall(b"x")
        assert b" 408 " in answer
        assert time.monotonic() - started < LIMIT


def test_slow_upload_ends_when_it_stops(server):
    port, _, _ = server
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        head = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
        connection.sendall(head + b'{"te')
        started = time.monotonic()
        assert b" 408 " in connection.recv(100)
        assert time.monotonic() - started < LIMIT


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "localhost", "Origin": "http://localhost:1"}, 403),
        ({"Host": "evil.example"}, 400),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
    ],
)
def test_foreign_hosts_and_origins_are_refused(server, headers, status):
    port, _, _ = server
    body = json.dumps({"text": "a dog"})
    assert request(port, "POST", "/api/search", body, headers.items())[0] == status


def test_replaced_file_is_not_served(server):
    port, _, videos = server
    status, body = request(port, "POST", "/api/search", json.dumps({"text": "a dog"}))
    hit = next(hit for hit in json.loads(body)["hits"] if hit["name"] == "clip1.mp4")
    assert request(port, "GET", f"/video/{hit['id']}")[0] == 200
    path = videos / "clip1.mp4"
    path.rename(videos / "aside.mp4")
    path.symlink_to("/etc/passwd")
    try:
        status, body = request(port, "GET", f"/video/{hit['id']}")
        assert status == 404
        assert "has changed since it was indexed" in json.loads(body)["error"]
        still = request(port, "GET", f"/still/{hit['id']}?second=0.5")
        assert still == request(port, "GET", f"/thumbnail/{hit['id']}")
        path.unlink()  # a link to a file of the same size and time
        status = (videos / "aside.mp4").stat()
        (videos.parent / "secret").write_bytes(b"S" * status.st_size)
        os.utime(videos.parent / "secret", ns=(status.st_atime_ns, status.st_mtime_ns))
        path.symlink_to(videos.parent / "secret")
        status, body = request(port, "GET", f"/video/{hit['id']}")
        assert (status, b"has changed" in body) == (404, True)
        path.unlink()
        os.mkfifo(path)  # which would be waited for
        status, body = request(port, "GET", f"/video/{hit['id']}")
        assert (status, json.loads(body)["error"]) == (404, "clip1.mp4 is not a regular file")
        still = request(port, "GET", f"/still/{hit['id']}?second=0.5")
        assert still == request(port, "GET", f"/thumbnail/{hit['id']}")
    finally:
        path.unlink()
        (videos / "aside.mp4").rename(path)


def test_long_input_is_refused(server):
    port, _, _ = server
    for fields in ({"text": "dog " * 20_000}, {"text": "a", "path": "x" * 10_000}):
        started = time.monotonic()
        status, body = request(port, "POST", "/api/search", json.dumps(fields))
        assert status == 400
        assert "must be a string of at most" in json.loads(body)["error"]
        assert time.monotonic() - started < 1
    assert request(port, "POST", "/api/search", b"x" * 200_000)[0] == 413
