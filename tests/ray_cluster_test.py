"""Tests of connecting to a Ray cluster."""

import signal
import socket
import time

import pytest

from xclip_jax.cli import InputError
from xclip_jax.search import ray_cluster, sharded
from xclip_jax.search.backends import RayWorkers

pytest.importorskip("ray", reason="Ray is not installed")


@pytest.mark.parametrize("pattern", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "ray://localhost:{}"])
def test_cluster_that_does_not_answer_is_an_error_at_once(pattern):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = pattern.format(server.getsockname()[1])  # which is closed from here on
    started = time.monotonic()
    message = r"^--workers=ray:.*: no Ray cluster answers: .*refused"
    with pytest.raises(InputError, match=message):
        assert RayWorkers(address, option=f"ray:{address}").slots
    assert time.monotonic() - started < 20  # Ray would try for minutes


def test_handler_of_sigterm_is_kept(monkeypatch):
    def init(address, **_):
        signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray does

    monkeypatch.setattr("ray.init", init)
    former = signal.getsignal(signal.SIGTERM)
    ray_cluster.connect("--ray=auto", "auto")
    assert signal.getsignal(signal.SIGTERM) == former


def test_connection_of_the_caller_is_not_taken_over(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    with pytest.raises(InputError, match="is connected to a Ray cluster already"):
        sharded._connect(None, 2)


def test_unknown_host_is_an_error_at_once(monkeypatch):
    def connect(address, timeout):
        raise socket.gaierror(f"no such host: {address}")

    monkeypatch.setattr(ray_cluster.socket, "create_connection", connect)
    with pytest.raises(InputError, match=r"^--ray=head:6379: .*no such host: \('head', 6379\)"):
        ray_cluster.connect("--ray=head:6379", "head:6379")
    with pytest.raises(InputError, match=r"no such host: \('fe80::1', 6379\)"):
        ray_cluster.connect("--ray", "[fe80::1]:6379")
