"""Receives videos and adds them to the index, one after another."""

import collections
import itertools
import logging
import os
import queue
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from starlette.exceptions import HTTPException
from starlette.requests import Request

from xclip_jax.cli import InputError, PathLike
from xclip_jax.data.extraction import VIDEO_SUFFIXES
from xclip_jax.search import bodies
from xclip_jax.search.index import Index
from xclip_jax.search.indexing import BusyError

MAX_NAME_BYTES, MAX_REPORTED, MAX_WAITING = 200, 100, 1000
MIN_FREE_BYTES = 2**31  # of the folder's disk, more than all uploads at once take
RETRY_SECONDS = 5  # while another process adds to the index
MAX_PART_SECONDS = 86_400  # age of a file that a killed server has not received completely


class Adder:
    """Saves videos in a folder, from where a thread adds them to the index.

    A file is complete before it has the name of a video. Those that the index has not seen when
    the server ends are added when it starts again.
    """

    def __init__(self, index: Index, folder: Path) -> None:
        self.index, self.folder = index, folder
        self.queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.waiting: list[str] = []
        self.running: str | None = None
        self.done: collections.deque[str] = collections.deque(maxlen=MAX_REPORTED)
        self.failed: collections.deque[dict[str, str]] = collections.deque(maxlen=MAX_REPORTED)

    def start(self) -> None:
        """Starts the thread, which first adds files that an earlier server left."""
        for part in self.folder.glob(".upload-*.part"):
            if time.time() - part.stat().st_mtime > MAX_PART_SECONDS:
                part.unlink(missing_ok=True)
        known = {film.path for film in self.index.films(max(1, self.index.num_files))}
        for path in sorted(self.folder.iterdir()):
            if path.suffix.lower() in VIDEO_SUFFIXES and str(path) not in known:
                self._enqueue(path.name)
        # Shutdown does not wait for the thread: the index stays complete if it is interrupted.
        threading.Thread(target=self._run, name="adding videos", daemon=True).start()

    def report(self) -> dict[str, Any]:
        """Returns the names of the files that wait, run, are done and failed."""
        with self.lock:
            lists = {"waiting": list(self.waiting), "running": self.running}
            return lists | {"done": list(self.done), "failed": list(self.failed)}

    async def receive(self, request: Request, name: str) -> str:
        """Saves the body of a request as a new file, and returns the file's name."""
        name = make_safe(name)
        if len(self.waiting) >= MAX_WAITING:
            raise HTTPException(503, "too many files wait to be added: try later", bodies.CLOSE)
        free = await run_sync(lambda: shutil.disk_usage(self.folder).free)
        if free < MIN_FREE_BYTES + int(request.headers.get("content-length") or 0):
            raise HTTPException(507, "the server's disk is full", bodies.CLOSE)
        handle, temporary = tempfile.mkstemp(".part", ".upload-", self.folder)
        try:
            with open(handle, "wb") as file:
                async for chunk in bodies.read_upload(request):
                    await run_sync(file.write, chunk)
                if not file.tell():
                    raise InputError(f"{name} is empty")
                os.fchmod(file.fileno(), 0o644)  # not only for the server's user
                await run_sync(lambda: (file.flush(), os.fsync(file.fileno())))
            name = reserve(self.folder, name)
            os.replace(temporary, self.folder / name)
        finally:
            Path(temporary).unlink(missing_ok=True)
        self._enqueue(name)
        return name

    def _enqueue(self, name: str) -> None:
        with self.lock:
            self.waiting.append(name)
        self.queue.put(name)

    def _run(self) -> None:
        while True:
            name = self.queue.get()
            while not self._try(name):
                time.sleep(RETRY_SECONDS)

    def _try(self, name: str) -> bool:
        """Adds a file to the index, or returns False if another process is adding to it."""
        with self.lock:
            self.waiting.remove(name)
            self.running = name
        try:
            reason = self._add(str(self.folder / name))
        except BusyError:
            with self.lock:
                self.running = None
                self.waiting.insert(0, name)
            return False
        with self.lock:
            self.running = None
            if reason is None:
                self.done.append(name)
            else:
                self.failed.append({"name": name, "reason": reason})
        return True

    def _add(self, path: str) -> str | None:
        """Adds a file to the index, and returns the reason if that fails.

        Raises BusyError if another process is adding to it.
        """
        try:
            summary = self.index.add([path])
        except BusyError:
            raise
        except InputError as error:
            return str(error)
        except Exception as error:
            logging.getLogger(__name__).error("%s could not be added", path, exc_info=error)
            return "internal error; see the terminal of the server"
        return summary.unreadable.get(path)


def check_folder(option: str, folder: PathLike) -> Path:
    """Returns the absolute path of a folder, or raises InputError if no file can be made in it."""
    path = Path(os.path.abspath(folder))
    if not path.is_dir():
        raise InputError(f"{option}={folder}: is not a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{option}={folder}: files cannot be written there")
    return path


def reserve(folder: Path, name: str) -> str:
    """Makes an empty file with this name, or "name (2)" and so on, and returns its name."""
    stem, suffix = os.path.splitext(name)
    for number in itertools.count(2):
        try:
            os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            break
        except FileExistsError:
            name = f"{stem} ({number}){suffix}"
    return name


def make_safe(name: str, suffixes: Collection[str] = VIDEO_SUFFIXES) -> str:
    """Returns a file name without folders and special characters.

    Raises InputError if nothing is left, or the suffix is not one of `suffixes`.
    """
    name = re.sub(r'[\x00-\x1f\x7f<>:"|?*\ud800-\udfff]', "", re.split(r"[/\\]", name)[-1])
    stem, suffix = os.path.splitext(name.strip().lstrip(".").strip())
    if not stem or suffix.lower() not in suffixes:
        raise InputError(f"name must be a file name with the suffix of a video: {name!r:.99}")
    return stem.encode()[:MAX_NAME_BYTES].decode("utf-8", "ignore").strip() + suffix
