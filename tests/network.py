"""Runs programs in a network namespace: Ray listens on all addresses of a machine."""

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

NAMESPACE = ["unshare", "--map-root-user", "--net"]


def run_isolated(program, *arguments, timeout, **variables):
    """Returns the finished process of a program beside this file, which calls `start_loopback`.

    Skips the test where namespaces are not permitted or Ray is not installed.
    """
    pytest.importorskip("ray", reason="Ray is not installed")
    permitted = shutil.which(NAMESPACE[0]) is not None
    if not permitted or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("network namespaces are not permitted")
    path = Path(__file__).with_name(program)
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {"RAY_TMPDIR": folder, "HOME": folder} | variables
        for name in ("JAX_COMPILATION_CACHE_DIR", "RAY_ADDRESS"):
            environment.pop(name, None)
        command = [*NAMESPACE, sys.executable, str(path), *map(str, arguments)]
        options = {"env": environment, "capture_output": True, "text": True}
        return subprocess.run(command, timeout=timeout, **options)


def find_processes():
    """Returns the ids of the other processes that were started below `run_isolated`."""
    found, own = [], os.environ["RAY_TMPDIR"].encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes()
        except OSError:  # of another user, or ended
            continue
        if own in variables and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def start_loopback():
    """Activates the loopback interface of a new network namespace."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
