"""Tests of the search page's server: responses, errors, and access to files of the index only."""

import concurrent.futures
import json
import mimetypes
import os
import threading
import time

import numpy as np
import pytest
from fake_index import CONTENT, SECRET, FakeIndex, jpeg, segment
from starlette.testclient import TestClient

from xclip_jax.search import bodies, endpoints, serve


@pytest.fixture
def index(tmp_path):
    names = ["dog.mp4", "<b>&.webm", "gone.mp4", "page.html"]
    for name in names:
        (tmp_path / name).write_bytes(CONTENT)
    (tmp_path / "gone.mp4").unlink()
    (tmp_path / "secret.txt").write_text(SECRET)
    return FakeIndex([(tmp_path / name, 10.0, 20.0, 12.5) for name in names])


@pytest.fixture
def client(index):
    with browser(index) as client:
        yield client


def browser(index, host="localhost:7870"):
    app = serve.make_app(index)
    return TestClient(app, f"http://{host}", raise_server_exceptions=False)


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()["error"]


def test_page_loads_only_its_own_files(client):
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    for name, kind in (("style.css", "text/css"), ("page.js", "text/javascript")):
        assert f'"{name}"' in page.text
        assert client.get(f"/{name}").headers["content-type"].startswith(kind)
    assert "default-src 'none'; script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"


def test_index_size_and_model_are_returned(client):
    facts = client.get("/api/index").json()
    assert (facts["segments"], facts["files"], facts["model"]) == (4, 2, "tiny")


def test_query_applies_filters(client, index, tmp_path):
    fields = {"text": "a dog", "k": "2", "path": "*.mp4", "start": "1.5", "end": 60}
    answer = client.post("/api/search", json=fields).json()
    assert index.queries == [("a dog", "*.mp4", 1.5, 60.0)]
    assert (answer["searched"], answer["note"], len(answer["hits"])) == (12340, "a note", 2)
    assert 0 <= answer["seconds"] < 1
    path = str(tmp_path / "dog.mp4")
    times = {"start": 10.0, "end": 20.0, "second": 12.5, "offset": 0.0, "duration": 60.0}
    times |= {"segment_start": 10.0, "segment_end": 20.0}
    hit = {"rank": 1, "score": 29.0, "id": segment(1), "path": path, "name": "dog.mp4", "bias": 0.0}
    picture = {"source": "picture", "score": 29.0, "start": 10.0, "end": 20.0, "text": ""}
    speech = picture | {"source": "speech", "score": 3.25, "text": "we say word 1"}
    hit |= {"weak": False, "matches": [picture, speech], "duplicates": []}
    assert answer["hits"][0] == hit | times


def test_query_accepts_long_texts_and_any_characters(client, index):
    text = "猫🐕" * 5000
    assert client.post("/api/search", json={"text": text}).status_code == 200
    assert index.queries[0][0] == text
    body = b'{"text": "lone \\ud83d surrogate"}'
    assert client.post("/api/search", content=body).status_code == 200
    assert index.queries[1][0] == "lone \ufffd surrogate"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ""}, "the query is empty"),
        ({}, "the query is empty"),
        ({"text": 3}, "text must be a string"),
        ({"text": "a", "k": 0}, "between 1 and 100"),
        ({"text": "a", "k": 101}, "between 1 and 100"),
        ({"text": "a", "k": "many"}, "between 1 and 100"),
        ({"text": "a", "k": 1e400}, "between 1 and 100"),
        ({"text": "a", "start": "soon"}, "start must be a number"),
        ({"text": "a", "end": "inf"}, "end must be a number"),
        ({"text": "a", "end": [1]}, "end must be a number"),
        (["a"], "not a JSON object"),
    ],
)
def test_invalid_query_is_an_error(client, fields, message):
    body = json.dumps(fields)
    assert message in error_of(client.post("/api/search", content=body), 400)


def test_body_that_is_invalid_or_too_large_is_an_error(client):
    assert "not a JSON" in error_of(client.post("/api/search", content=b"\xff{"), 400)
    assert "not a JSON" in error_of(client.post("/api/search", content=b"[" * 100_000), 400)
    huge = b'{"text": "a", "start": 1' + b"0" * 400 + b"}"
    assert "number of seconds" in error_of(client.post("/api/search", content=huge), 400)
    unknown_length = iter([b" " * 2**20] * 2)  # no Content-Length
    assert error_of(client.post("/api/search", content=unknown_length), 413) == "more than 0.125 MB"


def test_uploaded_example_is_deleted_after_the_search(client, index):
    response = client.post("/api/example?name=../Dog.JPG&k=3&path=*.mp4", content=jpeg("blue"))
    assert len(response.json()["hits"]) == 3
    ((file, path),) = index.queries
    assert path == "*.mp4"
    assert file.endswith(".jpg")
    assert not os.path.exists(file)


def test_corrupted_or_too_large_example_is_an_error(client, index, monkeypatch, tmp_path):
    monkeypatch.setattr(endpoints.tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    message = error_of(client.post("/api/example?name=a.jpg", content=b"garbage"), 400)
    assert message == "a.jpg: cannot be read as an image"
    monkeypatch.setattr(bodies, "MAX_UPLOAD_BYTES", 2**20)
    big = b"x" * (2**20 + 1)
    for body in (big, iter([big[: 2**19], big[2**19 :]])):
        assert error_of(client.post("/api/example", content=body), 413) == "more than 1 MB"
    assert index.queries == []
    assert sorted(tmp_path.iterdir()) == before


def test_segment_of_the_index_is_an_example(client, index):
    answer = client.get(f"/api/like/{segment(2)}?k=1&path=a&start=2&end=3").json()
    assert index.queries == [(segment(2), "a", 2.0, 3.0)]
    assert (answer["like"]["name"], len(answer["hits"])) == ("<b>&.webm", 1)
    assert "between 1" in error_of(client.get(f"/api/like/{segment(2)}?k=101"), 400)


def test_segment_is_returned_without_a_search(client, index):
    hit = client.get(f"/api/segment/{segment(1)}").json()
    assert (hit["id"], hit["name"], hit["rank"], hit["score"]) == (segment(1), "dog.mp4", 0, None)
    assert [hit[name] for name in ("start", "end", "second")] == [10, 20, 12.5]
    assert index.queries == []


@pytest.mark.parametrize(
    "address",
    [
        *("/api/like/{}", "/thumbnail/{}", "/still/{}?second=1", "/video/{}"),
        *("/clip/{}?start=1&end=2", "/preview/{}?start=1&end=2"),
    ],
)
def test_segment_that_is_removed_during_a_request_is_unknown(client, index, monkeypatch, address):
    remove_after_find(index, monkeypatch)
    assert error_of(client.get(address.format(segment(1))), 404) == endpoints.REMOVED


def test_segment_that_is_removed_before_its_heat_map_is_unknown(client, index, monkeypatch):
    remove_after_find(index, monkeypatch)
    response = client.post(f"/api/heat_map/{segment(1)}", json={"text": "a dog"})
    assert error_of(response, 404) == endpoints.REMOVED


def remove_after_find(index, monkeypatch):
    """Makes all methods but `segment` raise the error of an unknown id."""

    def fail(id, *arguments, **options):
        raise KeyError(id)

    for name in ("like", "heat_map", "thumbnail", "find_file"):
        monkeypatch.setattr(index, name, fail)


def test_other_missing_keys_are_defects(client, index, monkeypatch):
    monkeypatch.setattr(index, "like", lambda *_, **options: {}["column"])
    assert "internal error" in error_of(client.get(f"/api/like/{segment(1)}"), 500)


def test_heat_map_is_returned_for_each_word_and_frame(client):
    heat = client.post(f"/api/heat_map/{segment(1)}", json={"text": "a big dog"}).json()
    assert heat["words"] == ["a", "big", "dog"]
    assert np.shape(heat["words_by_frames"]) == (3, len(heat["times"]))
    assert len(heat["sentence"]) == len(heat["times"])
    refused = client.post(f"/api/heat_map/{segment(1)}", json={"text": "no attention"})
    assert "no heat map" in error_of(refused, 400)


def test_stills_fall_back_to_the_thumbnail(client, monkeypatch):
    stills = []

    def read_still(path, second, longest):
        stills.append((os.path.basename(path), second))
        if second > 15:
            raise endpoints.video.VideoError("no picture")
        return jpeg("green")

    monkeypatch.setattr(endpoints.video, "read_still", read_still)
    pictures = [client.get(f"/still/{segment(1)}?second={second}") for second in (12.5, 16)]
    assert [picture.content for picture in pictures] == [jpeg("green"), jpeg("red")]
    assert stills == [("dog.mp4", 12.5), ("dog.mp4", 16.0)]
    assert pictures[0].headers["content-type"] == "image/jpeg"
    assert client.get(f"/thumbnail/{segment(1)}").content == jpeg("red")
    assert "must be a number" in error_of(client.get(f"/still/{segment(1)}?second=nan"), 400)


def test_file_is_served_with_byte_ranges(client):
    address = f"/video/{segment(1)}"
    whole = client.get(address)
    assert (whole.status_code, whole.content) == (200, CONTENT)
    assert (whole.headers["content-type"], whole.headers["accept-ranges"]) == ("video/mp4", "bytes")
    part = client.get(address, headers={"Range": "bytes=100-299"})
    assert (part.status_code, part.content) == (206, CONTENT[100:300])
    assert part.headers["content-range"] == f"bytes 100-299/{len(CONTENT)}"
    tail = client.get(address, headers={"Range": "bytes=-5"})
    assert (tail.status_code, tail.content) == (206, CONTENT[-5:])
    beyond = client.get(address, headers={"Range": f"bytes={len(CONTENT)}-"})
    assert (beyond.status_code, beyond.content) == (416, b"")
    assert client.head(address).headers["content-length"] == str(len(CONTENT))


def test_html_file_is_served_as_a_download(client):
    assert client.get(f"/video/{segment(4)}").headers["content-type"] == "application/octet-stream"


def test_deleted_file_is_an_error_and_its_still_the_thumbnail(client):
    assert error_of(client.get(f"/video/{segment(3)}"), 404) == "gone.mp4 is no longer on disk"
    assert client.get(f"/still/{segment(3)}?second=1").content == jpeg("red")


@pytest.mark.parametrize("kind", ["video", "thumbnail", "still", "api/like", "api/segment"])
@pytest.mark.parametrize(
    "name",
    [
        *("f" * 16, "1", segment(1).upper() + "A", segment(1) + "%0A", "%00" * 16, "' OR '1'='1"),
        *("secret.txt", "../secret.txt", "..%2fsecret.txt", "%2e%2e/%2e%2e/etc/passwd"),
        *("/etc/passwd", "%2fetc%2fpasswd", f"{segment(1)}/../secret.txt", f"{segment(1)}/x", ""),
    ],
)
def test_only_ids_of_the_index_give_access_to_files(client, kind, name):
    response = client.get(f"/{kind}/{name}")
    error_of(response, 404)
    assert SECRET not in response.text
    assert "root:" not in response.text


@pytest.mark.parametrize(
    "path", ["/page/", "/page", "/serve.py", "/../serve.py", "/..%2fserve.py", "//etc/passwd"]
)
def test_source_files_are_not_served(client, path):
    error_of(client.get(path), 404)


def test_other_http_methods_are_errors(client):
    error_of(client.get("/api/search"), 405)
    error_of(client.post(f"/video/{segment(1)}"), 405)


def test_internal_error_is_logged_but_not_disclosed(client, caplog):
    response = client.post("/api/search", json={"text": "break"})
    message = error_of(response, 500)
    assert "terminal of the server" in message
    assert SECRET not in response.text
    assert "serve" not in response.text.replace("of the server", "")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert SECRET in caplog.text
    assert client.post("/api/search", json={"text": "a dog"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("localhost:7870", 200), ("127.0.0.1", 200), ("[::1]:7870", 200)),
        *(("evil.example", 400), ("localhost.evil.example:7870", 400), ("10.0.0.1", 400)),
    ],
)
def test_local_server_accepts_only_local_host_names(index, host, status):
    with browser(index, host) as client:
        assert client.get("/api/index").status_code == status


def test_content_type_does_not_depend_on_the_host(index, client, monkeypatch):
    monkeypatch.setattr(mimetypes, "guess_type", lambda *_, **__: ("text/html", None))
    response = client.get(f"/video/{segment(1)}")
    assert response.headers["content-type"] == "video/mp4"


def test_parallel_requests_run_two_queries_at_a_time(client, index):
    counts, running, lock = [], set(), threading.Lock()

    def slow(text, *_, **__):
        with lock:
            running.add(text)
            counts.append(len(running))
        time.sleep(0.01)
        with lock:
            running.discard(text)
        return index.answer(1, text)

    index.query = slow

    def ask(number):
        return client.post("/api/search", json={"text": f"dog {number}"}).status_code

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        statuses = list(pool.map(ask, range(50)))
    assert statuses == [200] * 50
    assert max(counts) == 2


def test_index_is_refreshed_also_after_a_failure(index, monkeypatch, caplog):
    monkeypatch.setattr(serve, "REFRESH_SECONDS", 0.01)
    calls = []

    def refresh():
        calls.append(len(calls))
        if len(calls) == 1:
            raise RuntimeError("a writer halfway through")
        index.refreshed.set()

    index.refresh = refresh
    with browser(index) as client:
        assert index.refreshed.wait(10)
        assert client.get("/api/index").status_code == 200
    assert "halfway" in caplog.text
