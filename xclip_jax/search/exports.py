"""Writes clips and previews to temporary files, a few at a time, and sends them."""

import collections
import contextlib
import itertools
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio.to_thread import run_sync
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

MAX_RUNNING, MAX_WAITING = 2, 16
MAX_CLIP_SECONDS, MAX_PREVIEW_SECONDS = 600, 60
KEPT_PREVIEWS, KEPT_SECONDS = 8, 600
Write = Callable[..., Any]  # takes the path of the file, and `stop`: see `clips.export_clip`


class _TemporaryVideo:
    """A file that is deleted once it is neither kept nor used."""

    def __init__(self, path: Path) -> None:
        self.path, self.users, self.kept, self.time = path, 0, False, time.monotonic()

    def use(self, users: int) -> None:
        """Adds to the number of users."""
        self.users += users
        if not self.users and not self.kept:
            self.path.unlink(missing_ok=True)


class _VideoResponse(FileResponse):
    """A response that uses a temporary video until it has been sent."""

    def __init__(self, temporary: _TemporaryVideo, **options: Any) -> None:
        super().__init__(temporary.path, media_type="video/mp4", **options)
        self.temporary = temporary

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.temporary.use(-1)


class Exports:
    """Temporary videos of a server."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="xclip_jax_")
        self.limiter, self.numbers = anyio.CapacityLimiter(MAX_RUNNING), itertools.count()
        self.waiting = anyio.Semaphore(MAX_RUNNING + MAX_WAITING)
        # Players request a preview several times, to seek.
        self.previews: collections.OrderedDict[Any, _TemporaryVideo] = collections.OrderedDict()
        self.locks: dict[Any, anyio.Lock] = {}

    def close(self) -> None:
        """Deletes all files."""
        self.folder.cleanup()

    async def send_clip(self, request: Request, write: Write, name: str) -> FileResponse:
        """Returns a file that `write` writes, as a download."""
        temporary = await self._make(request, write)
        return _VideoResponse(temporary, filename=name)

    async def send_preview(self, request: Request, write: Write, key: Any) -> FileResponse:
        """Returns a file that `write` writes, or that it has written for the same key."""
        lock = self.locks.setdefault(key, anyio.Lock())
        try:
            async with lock:
                temporary = self.previews.get(key)
                if temporary is None:
                    temporary = await self._make(request, write)
                    temporary.kept, self.previews[key] = True, temporary
                else:
                    temporary.use(1)
        finally:
            if not lock.statistics().tasks_waiting:
                self.locks.pop(key, None)
        temporary.time = time.monotonic()
        self.previews.move_to_end(key)
        self._forget()
        return _VideoResponse(temporary, headers={"Cache-Control": "private, max-age=3600"})

    def _forget(self) -> None:
        """Deletes the oldest previews."""
        while self.previews:
            key, temporary = next(iter(self.previews.items()))
            is_old = time.monotonic() - temporary.time > KEPT_SECONDS
            if len(self.previews) <= KEPT_PREVIEWS and not is_old:
                return
            del self.previews[key]
            temporary.kept = False
            temporary.use(0)

    async def _make(self, request: Request, write: Write) -> _TemporaryVideo:
        """Returns a file with one user, or raises HTTP 503 if too many requests wait.

        Raises ClientDisconnect if the client leaves: then it waits no longer for its turn.
        """
        try:
            self.waiting.acquire_nowait()
        except anyio.WouldBlock:
            raise HTTPException(503, "too many clips at once: try again later") from None
        path = Path(self.folder.name, f"{next(self.numbers)}.mp4")
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(path.unlink, missing_ok=True)
                await _run_unless_gone(request, write, path, self.limiter)
                stack.pop_all()
        finally:
            self.waiting.release()
        temporary = _TemporaryVideo(path)
        temporary.use(1)
        return temporary


async def _run_unless_gone(
    request: Request, write: Write, path: Path, limiter: anyio.CapacityLimiter
) -> None:
    """Calls `write` in a thread, or raises ClientDisconnect if the client leaves before the end."""
    stop, errors = threading.Event(), []

    async def watch(scope: anyio.CancelScope) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        stop.set()
        scope.cancel()

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, scope)
            try:  # a thread that runs is waited for: else more than a few would run at once
                await run_sync(partial(write, path, stop=stop.is_set), limiter=limiter)
            except Exception as error:  # raised below, not as a part of a group
                errors.append(error)
            finally:
                stop.set()
            tasks.cancel_scope.cancel()
    if scope.cancel_called:
        raise ClientDisconnect
    for error in errors:
        raise error
