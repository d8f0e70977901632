"""Program that indexes a folder on a Ray cluster of this machine, one worker of which is killed.

    python tests/ray_indexing.py INDEX VIDEOS

Prints the numbers of added files and of killed workers.
"""

import os
import signal
import sys
from pathlib import Path

from network import start_loopback

MARK = "XCLIP_JAX_RAY_TEST"  # variable of the processes of this cluster


def find_workers():
    """Returns the ids of the processes of this cluster that run tasks."""
    found, mark = [], f"{MARK}={os.getpid()}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # of another user, or ended
            continue
        if title.startswith(b"ray::encode_bundle") and mark in variables:
            found.append(int(process.name))
    return found


def main():
    start_loopback()
    os.environ[MARK] = str(os.getpid())
    from xclip_jax.search import Index, indexing
    from xclip_jax.search.store import Store

    indexing.MIN_COMMIT_SECONDS = indexing.COMMIT_FRACTION = 0
    append, killed = Store.append, []

    def append_and_kill(store, fragments, unreadable):
        append(store, fragments, unreadable)
        if fragments and not killed:
            killed.extend(find_workers()[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    Store.append = append_and_kill
    summary = Index.open(sys.argv[1]).add(sys.argv[2], workers="ray:local")
    print(summary.files, "files", len(killed), "killed")


if __name__ == "__main__":
    main()
