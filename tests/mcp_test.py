"""Tests of the MCP server through the client of the package mcp."""

import os
import sys
from pathlib import Path

import anyio
import pytest
from fake_index import CONTENT, SECRET, FakeIndex, segment

from xclip_jax.cli import InputError
from xclip_jax.data.container import VideoError
from xclip_jax.search import clips, mcp_server

mcp = pytest.importorskip("mcp", reason="mcp is not installed")


@pytest.fixture
def index(tmp_path):
    (tmp_path / "dog.mp4").write_bytes(CONTENT)
    names = ("dog.mp4", "cat.mp4", "gone.mp4")
    return FakeIndex([(tmp_path / name, 10.0, 20.0, 12.5) for name in names])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    return tmp_path / "clips"


def call(index, folder, name, **arguments):
    """Returns the result of one call of a tool."""

    async def ask():
        async with mcp.Client(mcp_server.make_server(index, folder)) as client:
            return await client.call_tool(name, arguments)

    return anyio.run(ask)


def error_of(result):
    assert result.is_error
    return result.content[0].text


def list_tools(index, folder):
    async def ask():
        async with mcp.Client(mcp_server.make_server(index, folder)) as client:
            return (await client.list_tools()).tools

    return {tool.name: tool for tool in anyio.run(ask)}


def test_tools_are_described(index, folder):
    tools = list_tools(index, folder)
    assert set(tools) == {"search", "list_films", "write_clip"}
    for tool in tools.values():
        assert tool.description
        assert tool.output_schema
        for field in tool.input_schema.get("properties", {}).values():
            assert field["description"], tool.name
    assert set(list_tools(index, None)) == {"search", "list_films"}


def test_search_applies_all_fields(index, folder):
    fields = {"k": 1, "offset": 1, "path": "*.mp4", "start": 1.5, "end": 60, "dedupe": False}
    result = call(index, folder, "search", text="a dog", sources=["picture"], **fields)
    assert not result.is_error
    assert index.queries == [("a dog", "*.mp4", 1.5, 60.0)]
    (hit,) = result.structured_content["hits"]
    assert (hit["rank"], hit["name"], hit["id"]) == (2, "cat.mp4", segment(2))
    assert [match["source"] for match in hit["matches"]] == ["picture"]
    assert index.refreshed.is_set()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ""}, "at least 1 character"),
        ({"text": "a", "k": 101}, "less than or equal to 100"),
        ({"text": "a", "start": -1}, "greater than or equal to 0"),
        ({"text": "a", "sources": ["smell"]}, "Input should be 'picture', 'speech' or 'text'"),
        ({"text": "a", "offset": 1000}, "offset + k must be at most 1000"),
        ({"text": "a" * 10_001}, "text must be a string of at most 10,000 characters"),
    ],
)
def test_invalid_search_is_an_error(index, folder, fields, message):
    assert message in error_of(call(index, folder, "search", **fields))


def test_defect_is_not_disclosed(index, folder):
    assert SECRET not in error_of(call(index, folder, "search", text="break"))


def test_films_are_listed(index, folder):
    (film,) = call(index, folder, "list_films", k=1).structured_content["films"]
    assert film["name"] == "dog.mp4"


def test_clips_are_new_files(index, folder, monkeypatch):
    def write(path, start, end, output):
        if start == 7:
            raise VideoError("nothing to decode")
        Path(output).write_text(f"{Path(path).name} {start:g}-{end:g}")

    monkeypatch.setattr(clips, "export_clip", write)
    monkeypatch.setattr(clips, "name_clip", lambda *_: "a dog.mp4")
    moment = {"id": segment(1), "start": 8, "end": 16}
    paths = [
        Path(call(index, folder, "write_clip", **moment).structured_content["path"])
        for _ in range(2)
    ]
    assert paths == [folder / "a dog.mp4", folder / "a dog (2).mp4"]
    assert [path.read_text() for path in paths] == ["dog.mp4 8-16"] * 2
    errors = {
        "nothing to decode": moment | {"start": 7},
        "must be after start": moment | {"end": 1},
        "at most 600 seconds": moment | {"end": 700},
        "not in the index": moment | {"id": "../../etc/passwd"},
        "no longer on disk": moment | {"id": segment(3)},
    }
    for message, fields in errors.items():
        assert message in error_of(call(index, folder, "write_clip", **fields))
    assert sorted(folder.iterdir()) == sorted(paths)


def test_missing_package_is_a_one_line_error(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    with pytest.raises(InputError, match=r"^the MCP server requires .* pip install"):
        mcp_server.make_server(index)


SERVER = """
import os, sys
from fake_index import FakeIndex
from xclip_jax.search import mcp_server

def open_index():
    print("opening")
    return FakeIndex([("dog.mp4", 10.0, 20.0, 12.5)])

class Loud(FakeIndex):
    pass

query = FakeIndex.query
def loud(self, text, k=10, **fields):
    print("searching")
    os.write(1, b"from a library\\n")
    return query(self, text, k, **fields)
FakeIndex.query = loud
mcp_server.run(open_index)
"""


def test_only_the_protocol_is_written_to_stdout(tmp_path):
    here = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])}
    parameters = mcp.StdioServerParameters(
        command=sys.executable, args=["-c", SERVER], env=environment
    )
    with open(tmp_path / "log", "w") as log:

        async def ask():
            from mcp.client.stdio import stdio_client

            async with mcp.Client(stdio_client(parameters, errlog=log)) as client:
                return await client.call_tool("search", {"text": "a dog"})

        result = anyio.run(ask)
    assert result.structured_content["hits"][0]["name"] == "dog.mp4"
    written = (tmp_path / "log").read_text()
    assert [text in written for text in ("opening", "searching", "from a library")] == [True] * 3
