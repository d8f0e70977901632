"""Tests of the server's API: paging, sources, films, clips, previews, its description."""

import socket
import threading
import time
from pathlib import Path

import pytest
from fake_index import serving
from serve_test import browser, client, error_of, index, segment
from starlette.testclient import TestClient

from xclip_jax.data.container import VideoError
from xclip_jax.search import clips, exports, results, serve
from xclip_jax.search.api import Film, Hit, Match
from xclip_jax.search.readable import UnreadableError
from xclip_jax.search.shards import UnavailableError

__all__ = ["client", "index"]  # the fixtures


def test_answers_have_the_fields_of_results():
    for model, name in ((Hit, "Hit"), (Match, "Match"), (Film, "Film")):
        fields = results.__dict__[name].__dataclass_fields__
        assert list(model.model_fields) == list(fields)


def test_facts_say_what_can_be_searched(client):
    facts = client.get("/api/index").json()
    assert facts["sources"] == ["picture", "speech", "text"]
    assert facts["examples"] == ["a dog in the snow", "two people talk"]
    assert (facts["can_add"], facts["has_text"], facts["dedupe"]) == (False, True, False)


def test_pages_of_hits_continue_the_ranks(client):
    def ranks(**fields):
        answer = client.post("/api/search", json={"text": "a dog", **fields}).json()
        return [hit["rank"] for hit in answer["hits"]]

    assert ranks(k=2) == [1, 2]
    assert ranks(k=2, offset=2) == [3, 4]
    assert ranks(k=2, offset=4) == []
    answer = client.get(f"/api/like/{segment(1)}?k=1&offset=3").json()
    assert [hit["rank"] for hit in answer["hits"]] == [4]


SOURCES_RULE = 'sources must be a list with one or more of "picture", "speech", "text"'


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offset": -1}, "offset must be between 0 and 1000"),
        ({"offset": 990, "k": 11}, "offset + k must be at most 1000"),
        *(({"sources": sources}, SOURCES_RULE) for sources in ([], ["smell"], "picture")),
        ({"dedupe": "perhaps"}, "dedupe must be true or false"),
    ],
)
def test_invalid_field_is_an_error(client, fields, message):
    response = client.post("/api/search", json={"text": "a", **fields})
    assert error_of(response, 400) == message


@pytest.mark.parametrize("kind", [UnavailableError, UnreadableError])
def test_index_out_of_reach_is_no_fault_of_the_client(client, index, monkeypatch, kind):
    def answer(*_, **__):
        raise kind("the index cannot be read")

    monkeypatch.setattr(index, "query", answer)
    response = client.post("/api/search", json={"text": "a dog"})
    assert error_of(response, 503) == "the index cannot be read"


def test_index_that_cannot_be_refreshed_is_reported_once_each_time(index, monkeypatch, caplog):
    refreshed = threading.Event()
    calls = []

    def refresh():
        calls.append(1)
        if len(calls) == 4:  # readable again, for a while
            return
        if len(calls) > 6:
            refreshed.set()
        raise UnreadableError("it was deleted")

    monkeypatch.setattr(index, "refresh", refresh)
    monkeypatch.setattr(serve, "REFRESH_SECONDS", 0)
    with TestClient(serve.make_app(index, ["testserver"])):
        assert refreshed.wait(10)
    assert caplog.messages == ["no new version is loaded: it was deleted"] * 2


def test_sources_are_searched_as_given(client):
    fields = {"text": "a dog", "sources": ["speech"]}
    hits = client.post("/api/search", json=fields).json()["hits"]
    assert [hit["rank"] for hit in hits] == [1, 3]
    assert {match["source"] for hit in hits for match in hit["matches"]} == {"speech"}


def test_near_duplicates_are_folded_by_request_or_by_default(client, index):
    query = {"text": "a dog", "dedupe": True}
    (first, second) = client.post("/api/search", json=query).json()["hits"]
    assert [hit["name"] for hit in first["duplicates"]] == ["<b>&.webm"]
    assert second["rank"] == 2
    with TestClient(serve.make_app(index, ["testserver"], dedupe=True)) as other:
        assert other.get("/api/index").json()["dedupe"]
        assert len(other.get(f"/api/like/{segment(1)}").json()["hits"]) == 2
        assert len(other.get(f"/api/like/{segment(1)}?dedupe=false").json()["hits"]) == 4


def test_newest_films_are_listed(client, tmp_path):
    (film,) = client.get("/api/films?k=1").json()["films"]
    assert (film["id"], film["path"]) == (segment(1), str(tmp_path / "dog.mp4"))
    assert (film["name"], film["duration"], film["mtime"]) == ("dog.mp4", 60.0, 1.7e9)
    assert len(client.get("/api/films").json()["films"]) == 4
    assert error_of(client.get("/api/films?k=0"), 400) == "k must be between 1 and 100"


@pytest.fixture
def exported(monkeypatch):
    """Replaces the functions that write clips, and collects their arguments."""
    calls = []

    def write(path, start, end, output, **_):
        calls.append((Path(path).name, start, end, output))
        if start == 7:
            Path(output).write_bytes(b"half a")
            raise VideoError("nothing to decode")
        Path(output).write_bytes(b"moment" * 100)

    monkeypatch.setattr(clips, "export_clip", write)
    monkeypatch.setattr(clips, "make_preview", write)
    monkeypatch.setattr(clips, "name_clip", lambda path, *times: f"a dog {times}.mp4")
    return calls


def test_clip_is_a_download_whose_file_is_deleted(client, exported):
    response = client.get(f"/clip/{segment(1)}?start=8&end=76.2")
    assert response.content == b"moment" * 100
    assert response.headers["content-type"] == "video/mp4"
    disposition = "attachment; filename*=utf-8''a%20dog%20%288.0%2C%2076.2%29.mp4"
    assert response.headers["content-disposition"] == disposition
    ((name, start, end, output),) = exported
    assert (name, start, end) == ("dog.mp4", 8.0, 76.2)
    assert not Path(output).exists()


def test_preview_is_written_once_for_several_ranges(client, exported):
    address = f"/preview/{segment(1)}?start=8&end=16"
    assert client.get(address).content == b"moment" * 100
    part = client.get(address, headers={"Range": "bytes=2-7"})
    assert (part.status_code, part.content) == (206, b"mentmo")
    assert len(exported) == 1
    assert Path(exported[0][3]).exists()
    for second in range(exports.KEPT_PREVIEWS):
        client.get(f"/preview/{segment(1)}?start={second + 10}&end=30")
    assert not Path(exported[0][3]).exists()
    assert sum(Path(output).exists() for *_, output in exported) == exports.KEPT_PREVIEWS


def test_temporary_files_are_deleted_when_the_server_ends(index, exported):
    with browser(index) as client:
        client.get(f"/preview/{segment(1)}?start=8&end=16")
        folder = Path(exported[0][3]).parent
        assert folder.exists()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        (f"clip/{segment(1)}", 400, "start must be a number of seconds, at least 0"),
        (f"clip/{segment(1)}?start=1&end=nan", 400, "end must be a number of seconds, at least 0"),
        (f"clip/{segment(1)}?start=2&end=1", 400, "end = 1: must be after start = 2"),
        (f"clip/{segment(1)}?start=0&end=601", 400, "a clip has at most 600 seconds, not 601"),
        (f"preview/{segment(1)}?start=0&end=61", 400, "a preview has at most 60 seconds, not 61"),
        (f"clip/{segment(1)}?start=7&end=8", 400, "nothing to decode"),
        (f"preview/{segment(1)}?start=7&end=8", 400, "nothing to decode"),
        (f"clip/{segment(3)}?start=1&end=2", 404, "gone.mp4 is no longer on disk"),
        (f"preview/{segment(9)}?start=1&end=2", 404, "not in the index"),
    ],
)
def test_moment_that_cannot_be_exported_is_an_error(client, exported, address, status, message):
    assert message in error_of(client.get(f"/{address}"), status)
    assert not any(Path(output).exists() for *_, output in exported)


def test_only_a_few_clips_are_written_at_once(client, exported, monkeypatch):
    running, counts, go = [], [], threading.Event()

    def write(path, start, end, output, stop):
        running.append(output)
        counts.append(len(running))
        go.wait(10)
        Path(output).write_bytes(b"clip")
        running.remove(output)

    monkeypatch.setattr(clips, "export_clip", write)
    statuses = []

    def ask(second):
        address = f"/clip/{segment(1)}?start={second}&end=60"
        statuses.append(client.get(address).status_code)

    number = exports.MAX_RUNNING + exports.MAX_WAITING + 3
    threads = [threading.Thread(target=ask, args=(second,)) for second in range(number)]
    for thread in threads:
        thread.start()
    while len(statuses) < 3:
        time.sleep(0.01)
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * (number - 3) + [503] * 3
    assert max(counts) == exports.MAX_RUNNING


def test_clip_of_a_client_that_leaves_is_cancelled(index, exported, monkeypatch):
    stopped, started = threading.Event(), threading.Event()

    def write(path, start, end, output, stop):
        exported.append(output)
        Path(output).write_bytes(b"half a clip")
        started.set()
        while not stop():
            time.sleep(0.01)
        stopped.set()
        raise RuntimeError("cancelled")

    monkeypatch.setattr(clips, "export_clip", write)
    with serving(index) as address:
        with socket.create_connection(address, 10) as connection:
            path = f"/clip/{segment(1)}?start=1&end=2"
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert started.wait(10)
        assert stopped.wait(10)
        for _ in range(500):
            if not Path(exported[0]).exists():
                break
            time.sleep(0.01)
        assert not Path(exported[0]).exists()
