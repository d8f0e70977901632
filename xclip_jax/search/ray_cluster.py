"""Connects to a Ray cluster."""
# pyright: reportMissingImports=false

import logging
import os
import re
import signal
import socket
import threading
import warnings
from typing import Any

from xclip_jax.cli import InputError, first_line

_CONNECT_SECONDS = 5.0


def connect(option: str, address: str | None, **options: Any) -> None:
    """Connects this process to a cluster, unless it is connected.

    Args:
        option: the command-line option, for errors.
        address: HOST:PORT, ray://HOST:PORT of a client server, "auto" for the cluster of this
            machine, "local" for a new one; None: that of this
            machine if there is one, else a new one.
        **options: further ones of `ray.init`.

    Raises:
        InputError: the cluster cannot be reached or started.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _reach(address or "")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e.g. it forks before it executes
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # which Ray has replaced
    except Exception as error:  # Ray has no common type
        is_new = address in (None, "local")
        problem = "a Ray cluster could not start" if is_new else "no Ray cluster answers"
        raise InputError(f"{option}: {problem}: {first_line(error)}") from None


def _reach(address: str) -> None:
    """Raises OSError if a host cannot be reached: Ray would try for minutes."""
    if match := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address):
        host, port = match.groups()
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
