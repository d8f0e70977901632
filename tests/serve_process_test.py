"""Tests of the server as a process: its port, its address, Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from serve_test import index

from xclip_jax.cli import InputError
from xclip_jax.search import serve

__all__ = ["index"]  # the fixture


def test_port_in_use_is_a_one_line_error(index):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"^cannot listen on 127.0.0.1, port {port}: [^\n]+$"):
            serve.serve(index, "127.0.0.1", port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_invalid_port_is_an_error(index, port):
    with pytest.raises(InputError, match="cannot listen"):
        serve.serve(index, "127.0.0.1", port)


SERVER = """
from fake_index import FakeIndex
from xclip_jax.search.serve import serve
serve(FakeIndex([({path!r}, 0, 1, 0)]), port=0)
"""


def test_server_prints_its_address_and_ends_on_ctrl_c(tmp_path):
    (tmp_path / "long.mp4").write_bytes(b"0" * 50_000_000)
    program = SERVER.format(path=str(tmp_path / "long.mp4"))
    here = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment, **pipes) as process:
        first, second = process.stdout.readline(), process.stdout.readline()
        port = int(second.split("http://127.0.0.1:")[1].split()[0])
        with socket.create_connection(("127.0.0.1", port), 10) as watching:
            watching.sendall(f"GET /video/{1:016x} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert watching.recv(100).startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGINT)  # while a client reads no further
            rest, _ = process.communicate(timeout=60)
    assert first == "videos.index: 1 segments of 2 files\n"
    assert (process.returncode, rest) == (0, "")
