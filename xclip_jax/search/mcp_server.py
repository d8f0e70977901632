"""Server of the Model Context Protocol: assistants search the index and write clips."""
# pyright: reportMissingImports=false

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

import xclip_jax
from xclip_jax.cli import InputError
from xclip_jax.data.container import VideoError
from xclip_jax.search import api, clips
from xclip_jax.search.adding import reserve
from xclip_jax.search.exports import MAX_CLIP_SECONDS
from xclip_jax.search.index import Index
from xclip_jax.search.results import Source

INSTRUCTIONS = """Searches a collection of videos. Ask `search` for a moment in plain words, such as
"a dog on a skateboard". All times are seconds after the first frame of a file. A hit that is `weak`
probably does not show what was asked for."""
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ClipFile(BaseModel):
    """A moment that was written to a file."""

    path: str = Field(description="Absolute path of the file.")


def make_server(index: Index, output: Path | None = None) -> Any:
    """Returns an `MCPServer` with the tools search, list_films and, with `output`, write_clip.

    Args:
        index: an open index.
        output: folder in which clips are written.

    Raises:
        InputError: the package `mcp` is missing.
    """
    try:
        from mcp.server import MCPServer
        from mcp_types import ToolAnnotations
    except ImportError:
        problem = "the MCP server requires the package mcp, version 2: pip install -e '.[mcp]'"
        raise InputError(problem) from None
    about: Any = {"version": xclip_jax.__version__, "instructions": INSTRUCTIONS}
    server = MCPServer("xclip_jax search", log_level="WARNING", **about)
    tools = _Tools(index, output)
    reads = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    server.tool(annotations=reads)(tools.search)
    server.tool(annotations=reads)(tools.list_films)
    if output is not None:
        adds = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
        server.tool(annotations=adds)(tools.write_clip)
    return server


def run(open_index: Any, output: Path | None = None) -> None:
    """Serves an index on stdin and stdout until stdin ends.

    Args:
        open_index: function that opens the index; what it prints goes to stderr.
        output: see `make_server`.
    """
    with contextlib.redirect_stdout(sys.stderr):
        server = make_server(open_index(), output)
    # The server diverts what is written to stdout while it runs; the rest of a buffer would follow.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    server.run("stdio")


class _Tools:
    """The functions that assistants call."""

    def __init__(self, index: Index, output: Path | None) -> None:
        self.index, self.output = index, output

    def search(
        self,
        text: Annotated[str, Field(min_length=1, description=api.describe("text"))],
        k: Annotated[int, Field(ge=1, le=api.MAX_HITS, description=api.describe("k"))] = 10,
        offset: Annotated[int, Field(ge=0, description=api.describe("offset"))] = 0,
        path: Annotated[str | None, Field(description=api.describe("path"))] = None,
        start: Annotated[_Seconds | None, Field(description=api.describe("start"))] = None,
        *,
        end: Annotated[_Seconds | None, Field(description=api.describe("end"))] = None,
        sources: Annotated[
            list[Source] | None, Field(min_length=1, description=api.describe("sources"))
        ] = None,
        dedupe: Annotated[bool, Field(description=api.describe("dedupe"))] = True,
    ) -> api.Hits:
        """Finds moments of videos that match a sentence, best first."""
        with _tool_errors():
            self._refresh()
            fields: Any = {"k": k, "offset": offset, "path": path, "start": start, "end": end}
            request = api.SearchRequest(text=text, sources=sources, dedupe=dedupe, **fields)
            answer = self.index.query(request.text, **request.options(dedupe))
            return api.Hits(**api.read_answer(answer))

    def list_films(
        self, k: Annotated[int, Field(ge=1, le=api.MAX_FILMS, description="Number of films.")] = 20
    ) -> api.Films:
        """Lists the newest videos of the index."""
        with _tool_errors():
            self._refresh()
            return api.Films.model_validate({"films": self.index.films(k)})

    def write_clip(
        self,
        id: Annotated[str, Field(description="The id of a hit or film.")],
        start: Annotated[_Seconds, Field(description="Start of the moment in the film.")],
        end: Annotated[_Seconds, Field(description="End of the moment in the film.")],
    ) -> ClipFile:
        """Writes a moment of a film to a new .mp4 file, and returns the file's path."""
        with _tool_errors():
            moment = api.MomentRequest(start=start, end=end)
            moment.check_length("clip", MAX_CLIP_SECONDS)
            path, folder = self.index.find_file(id), self.output
            assert folder is not None
            file = folder / reserve(folder, clips.name_clip(path, start, end))
            try:
                clips.export_clip(path, start, end, file)
            except BaseException:
                file.unlink(missing_ok=True)
                raise
            return ClipFile(path=str(file))

    def _refresh(self) -> None:
        """Loads what another process has added to the index."""
        try:
            self.index.refresh()
        except Exception:  # a writer may be halfway through a commit
            logging.getLogger(__name__).exception("the index could not be refreshed")


@contextlib.contextmanager
def _tool_errors() -> Iterator[None]:
    """Turns errors of a request into those that an assistant reads."""
    from mcp.server.mcpserver.exceptions import ToolError

    try:
        yield
    except KeyError:
        raise ToolError("this id is not in the index: search again") from None
    except ValidationError as error:
        raise ToolError(api.explain(error.errors()[0])) from None
    except (InputError, VideoError, OSError) as error:
        raise ToolError(str(error)) from error
