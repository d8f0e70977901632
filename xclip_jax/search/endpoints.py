"""Endpoints of the search server.

Files are requested by the id of a segment: no path comes from a client. Work on the index and on
files runs in a few threads, so that other requests are still handled.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException

from xclip_jax.cli import InputError
from xclip_jax.data import video
from xclip_jax.data.container import VideoError
from xclip_jax.search import api, bodies, clips, results
from xclip_jax.search.adding import Adder
from xclip_jax.search.exports import MAX_CLIP_SECONDS, MAX_PREVIEW_SECONDS, Exports
from xclip_jax.search.searcher import Searcher

MAX_UPLOADS = 4  # at once
STILL_SIDE = 480  # pixels, the longer side
# What browsers may play. The host's own table might call a video a web page.
MEDIA_TYPES = {".mp4": "mp4", ".m4v": "mp4", ".mov": "quicktime", ".qt": "quicktime"}
MEDIA_TYPES |= {".webm": "webm", ".mkv": "x-matroska", ".ogv": "ogg", ".ogg": "ogg"}
MEDIA_TYPES |= {".avi": "x-msvideo", ".mpg": "mpeg", ".mpeg": "mpeg", ".ts": "mp2t"}
CACHED = {"Cache-Control": "private, max-age=3600"}  # the pictures of an id do not change
REMOVED = "this segment is not in the index, it may have been removed: search again"
_BINARY: Any = {"schema": {"type": "string", "format": "binary"}}
_UPLOAD: Any = {"required": True, "content": {"application/octet-stream": _BINARY}}
_ERROR: Any = {"model": api.Error}


class Endpoints:
    """The functions that handle requests.

    Args:
        index: an open index.
        adder: what receives videos, or None to refuse them.
        dedupe: True to fold near-duplicates where a request does not say.
    """

    def __init__(self, index: Searcher, adder: Adder | None, *, dedupe: bool = False) -> None:
        self.index, self.adder, self.dedupe = index, adder, dedupe
        self.exports = Exports()
        # Separate limits, so that a page of pictures does not delay the next query.
        # Examples have one of their own: nor do they.
        self.query_limiter = anyio.CapacityLimiter(index.concurrency)
        self.picture_limiter = anyio.CapacityLimiter(index.concurrency)
        self.example_limiter, self.uploads = anyio.CapacityLimiter(1), anyio.Semaphore(MAX_UPLOADS)

    def make_router(self) -> APIRouter:
        """Returns the routes to the functions."""
        router = APIRouter(
            route_class=bodies.LimitedRoute,
            strict_content_type=False,
            responses={
                "4XX": {**_ERROR, "description": "The request is refused"},
                "5XX": {**_ERROR, "description": "The server is too busy, or has an error"},
            },
        )
        upload: Any = {"openapi_extra": {"requestBody": _UPLOAD}}
        router.get("/api/index", tags=["index"])(self.get_facts)
        router.get("/api/films", tags=["index"])(self.get_films)
        router.post("/api/search", tags=["search"])(self.search)
        router.post("/api/example", tags=["search"], **upload)(self.search_example)
        router.get("/api/segment/{id}", tags=["search"])(self.get_segment)
        router.get("/api/like/{id}", tags=["search"])(self.search_like)
        router.post("/api/heat_map/{id}", tags=["search"])(self.get_heat_map)
        files = {
            "thumbnail": (self.get_thumbnail, "image/jpeg"),
            "still": (self.get_still, "image/jpeg"),
            "video": (self.get_video, "video/*", "application/octet-stream"),
            "clip": (self.get_clip, "video/mp4"),
            "preview": (self.get_preview, "video/mp4"),
        }
        for name, (function, *types) in files.items():
            route, content = f"/{name}/{{id}}", dict.fromkeys(types, _BINARY)
            responses: dict[int | str, Any] = {200: {"content": content}}
            if name in ("video", "preview"):
                responses[206] = {"content": content, "description": "The requested byte range"}
            options: Any = {"response_class": Response, "responses": responses}
            router.get(route, tags=["files"], **options)(function)
            if name != "clip":  # a player may ask for the size first
                router.head(route, include_in_schema=False)(function)
        router.post("/api/add", tags=["add"], **upload)(self.add)
        router.get("/api/add", tags=["add"])(self.get_additions)
        return router

    async def get_facts(self) -> api.Facts:
        """Returns the sizes of the index and the limits of the server."""

        def read() -> api.Facts:
            index, path = self.index, Path(self.index.model_name)
            sources = list(index.sources)
            return api.Facts(
                segments=index.num_segments,
                files=index.num_files,
                model=path.parent.name if path.name == "model" else path.name,
                max_upload_bytes=bodies.MAX_UPLOAD_BYTES,
                sources=sources,
                examples=index.examples,
                can_add=self.adder is not None,
                has_text=any(source != "picture" for source in sources),
                dedupe=self.dedupe,
            )

        return await run_sync(read, limiter=self.picture_limiter)

    async def get_films(self, fields: Annotated[api.FilmsRequest, Query()]) -> api.Films:
        """Returns the newest films."""
        films = await run_sync(self.index.films, fields.k, limiter=self.picture_limiter)
        return api.Films.model_validate({"films": films})

    async def search(self, fields: api.SearchRequest) -> api.Hits:
        """Searches by a sentence."""
        options = fields.options(self.dedupe)
        query = partial(self.index.query, fields.text, **options)
        return api.Hits(**await self._run(query, self.query_limiter))

    async def search_example(
        self, request: Request, fields: Annotated[api.ExampleRequest, Query()]
    ) -> api.Hits:
        """Searches by an image or video, whose bytes are the body of the request."""
        suffix = "".join(re.findall(r"\.[a-z0-9]{1,8}\Z", fields.name.lower()))
        with self._upload(), tempfile.NamedTemporaryFile(suffix=suffix) as file:
            async for chunk in bodies.read_upload(request):
                await run_sync(file.write, chunk)
            await run_sync(file.flush)
            try:
                search = partial(self.index.similar, file.name, **fields.options(self.dedupe))
                return api.Hits(**await self._run(search, self.example_limiter))
            except InputError as error:  # the user does not know the temporary name
                name = fields.name or "the file"
                raise InputError(str(error).replace(file.name, name)) from error

    async def get_segment(self, id: str) -> api.Hit:
        """Returns a segment of the index, with the rank 0 and without a score."""
        return api.Hit.model_validate(await self._segment(id))

    async def search_like(self, id: str, fields: Annotated[api.Filters, Query()]) -> api.HitsLike:
        """Searches by a segment of the index."""
        segment = await self._segment(id)
        search = partial(self.index.like, segment.id, **fields.options(self.dedupe))
        with _known(id):
            answer = await self._run(search, self.query_limiter)
        return api.HitsLike(**answer, like=api.Hit.model_validate(segment))

    async def get_heat_map(self, id: str, fields: api.HeatMapRequest) -> api.HeatMap:
        """Compares a sentence and its words with the frames of a segment."""
        segment = await self._segment(id)
        compute = partial(self.index.heat_map, segment.id, fields.text)
        with _known(id):
            heat = await run_sync(compute, limiter=self.query_limiter)
        rows = heat.words_WxF.tolist()
        return api.HeatMap(
            words=heat.words, times=heat.times, words_by_frames=rows, sentence=heat.sentence
        )

    async def get_thumbnail(self, id: str) -> Response:
        """Returns the stored picture of a segment."""
        return await self._send_picture(await self._segment(id), None)

    async def get_still(self, id: str, fields: Annotated[api.StillRequest, Query()]) -> Response:
        """Returns the picture at a second of a film, or the stored one if the file has none."""
        return await self._send_picture(await self._segment(id), fields.second)

    async def get_video(self, id: str) -> FileResponse:
        """Returns the segment's file, or the byte ranges of it that a seeking player requests."""
        path = await self._find_file(await self._segment(id))
        kind = MEDIA_TYPES.get(os.path.splitext(path)[1].lower())
        media_type = f"video/{kind}" if kind else "application/octet-stream"
        return FileResponse(path, media_type=media_type)

    async def get_clip(
        self, request: Request, id: str, moment: Annotated[api.MomentRequest, Query()]
    ) -> FileResponse:
        """Returns a moment of a segment's film as a file to download."""
        moment.check_length("clip", MAX_CLIP_SECONDS)
        segment = await self._segment(id)
        path = await self._find_file(segment)
        name = clips.name_clip(path, moment.start, moment.end)
        write = partial(clips.export_clip, path, moment.start, moment.end)
        with _video_errors():
            return await self.exports.send_clip(request, write, name)

    async def get_preview(
        self, request: Request, id: str, moment: Annotated[api.MomentRequest, Query()]
    ) -> FileResponse:
        """Returns a moment of a segment's film as a small video that every browser plays."""
        moment.check_length("preview", MAX_PREVIEW_SECONDS)
        path = await self._find_file(await self._segment(id))
        write = partial(clips.make_preview, path, moment.start, moment.end)
        key = path, moment.start, moment.end
        with _video_errors():
            return await self.exports.send_preview(request, write, key)

    async def add(self, request: Request, fields: Annotated[api.AddRequest, Query()]) -> api.Added:
        """Saves a video, whose bytes are the body of the request, and adds it to the index later.

        Only if the server was started with --allow_add.
        """
        adder = self._adder()
        with self._upload():
            return api.Added(name=await adder.receive(request, fields.name))

    async def get_additions(self) -> api.Additions:
        """Returns which videos wait to be added to the index, and which were added."""
        return api.Additions.model_validate(self._adder().report())

    def _adder(self) -> Adder:
        if self.adder is None:
            problem = "this server accepts no videos: see --allow_add"
            raise HTTPException(403, problem, bodies.CLOSE)
        return self.adder

    @contextlib.contextmanager
    def _upload(self) -> Iterator[None]:
        """Occupies one of the MAX_UPLOADS, or raises HTTP 503."""
        try:
            self.uploads.acquire_nowait()
        except anyio.WouldBlock:
            problem = "too many uploads at once: try again later"
            raise HTTPException(503, problem, bodies.CLOSE) from None
        try:
            yield
        finally:
            self.uploads.release()

    async def _run(
        self, search: Callable[[], results.Answer], limiter: anyio.CapacityLimiter
    ) -> dict[str, Any]:
        """Returns the fields of `api.Hits`."""
        return api.read_answer(await run_sync(search, limiter=limiter))

    async def _segment(self, id: str) -> results.Hit:
        """Returns the segment, or raises HTTP 404."""
        with _known(id):
            return await run_sync(self.index.segment, id)

    async def _find_file(self, segment: results.Hit) -> str:
        """Returns the path of a segment's file, or raises HTTP 404."""
        try:
            with _known(segment.id):
                return await run_sync(self.index.find_file, segment.id)
        except OSError as error:
            raise HTTPException(404, str(error)) from None

    async def _send_picture(self, segment: results.Hit, second: float | None) -> Response:
        def read() -> bytes:
            if second is not None:
                with contextlib.suppress(VideoError, OSError):
                    path = self.index.find_file(segment.id)
                    return video.read_still(path, second, STILL_SIDE)
            return self.index.thumbnail(segment.id)

        with _known(segment.id):
            jpeg = await run_sync(read, limiter=self.picture_limiter)
        return Response(jpeg, media_type="image/jpeg", headers=CACHED)


@contextlib.contextmanager
def _known(id: str) -> Iterator[None]:
    """Raises HTTP 404 if the index does not have a segment, or has it no longer."""
    try:
        yield
    except KeyError as error:
        if error.args != (id,):
            raise
        raise HTTPException(404, REMOVED) from None


@contextlib.contextmanager
def _video_errors() -> Iterator[None]:
    """Turns errors of a file into those of the request."""
    try:
        yield
    except VideoError as error:
        raise InputError(str(error)) from error
