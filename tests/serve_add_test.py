"""Tests of adding videos through the server: names, limits, one file at a time, nothing lost."""

import os
import threading
import time
from pathlib import Path

import pytest
from fake_index import SECRET, FakeIndex
from serve_test import error_of, index
from starlette.testclient import TestClient

from xclip_jax.cli import InputError
from xclip_jax.search import adding, bodies, serve

__all__ = ["index"]  # the fixture


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "added").mkdir()
    return tmp_path / "added"


@pytest.fixture
def client(index, folder):
    with adding_client(index, folder) as client:
        yield client


def adding_client(index, folder):
    app = serve.make_app(index, ["testserver"], allow_add=folder)
    return TestClient(app, raise_server_exceptions=False)


def send(client, name, content=b"video"):
    return client.post("/api/add", params={"name": name}, content=content)


def wait_until_idle(client):
    """Returns the report once nothing waits or runs."""
    for _ in range(500):
        report = client.get("/api/add").json()
        if not report["waiting"] and report["running"] is None:
            return report
        time.sleep(0.01)
    raise AssertionError(report)


def test_server_accepts_no_videos_unless_allowed(index):
    with TestClient(serve.make_app(index, ["testserver"])) as client:
        message = "this server accepts no videos: see --allow_add"
        assert error_of(send(client, "dog.mp4"), 403) == message
        assert error_of(client.get("/api/add"), 403) == message


def test_video_is_saved_and_added(client, index, folder):
    assert client.get("/api/index").json()["can_add"]
    assert send(client, "my dog.MP4", b"video 1").json() == {"name": "my dog.MP4"}
    report = {"waiting": [], "running": None, "done": ["my dog.MP4"], "failed": []}
    assert wait_until_idle(client) == report
    assert index.added == [str(folder / "my dog.MP4")]
    assert [path.name for path in folder.iterdir()] == ["my dog.MP4"]
    assert (folder / "my dog.MP4").read_bytes() == b"video 1"


def test_no_file_is_replaced(client, index, folder):
    names = [send(client, "dog.mp4", f"{number}".encode()).json()["name"] for number in range(3)]
    assert names == ["dog.mp4", "dog (2).mp4", "dog (3).mp4"]
    assert [(folder / name).read_bytes() for name in names] == [b"0", b"1", b"2"]
    assert wait_until_idle(client)["done"] == names


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("../../dog.mp4", "dog.mp4"),
        ("/etc/cron.d/dog.mp4", "dog.mp4"),
        ("C:\\videos\\dog.mp4", "dog.mp4"),
        ("..dog.mp4", "dog.mp4"),
        ("a\x00b\n<c>|\x7f?.mp4", "abc.mp4"),
        ("猫 \u202e🐕.mkv", "猫 \u202e🐕.mkv"),
        ("é" * 150 + ".webm", "é" * 100 + ".webm"),
        (" dog .mp4", "dog.mp4"),
    ],
)
def test_name_is_made_safe(client, folder, name, saved):
    assert send(client, name).json()["name"] == saved
    assert os.listdir(folder) == [saved]
    wait_until_idle(client)


@pytest.mark.parametrize(
    "name", ["", "dog", "dog.txt", "dog.mp4/", "..", "/", ".mp4", "dog.mp4.m3u8", "dog.mp4\\", "."]
)
def test_name_without_the_suffix_of_a_video_is_an_error(client, folder, name):
    assert "name must be a file name with the suffix" in error_of(send(client, name), 400)
    assert os.listdir(folder) == []


def test_too_large_or_empty_or_unfinished_file_is_not_saved(client, folder, monkeypatch):
    monkeypatch.setattr(bodies, "MAX_UPLOAD_BYTES", 2**20)
    big = iter([b"x" * 2**19] * 3)
    assert error_of(send(client, "a.mp4", big), 413) == "more than 1 MB"
    assert error_of(send(client, "a.mp4", b""), 400) == "a.mp4 is empty"
    monkeypatch.setattr(adding, "MIN_FREE_BYTES", 2**80)
    assert error_of(send(client, "a.mp4"), 507) == "the server's disk is full"
    assert os.listdir(folder) == []


def test_failures_are_reported_and_the_next_file_is_added(client, index, caplog):
    for name, content in (("a.mp4", b"bad"), ("b.mp4", b"break"), ("c.mp4", b"good")):
        send(client, name, content)
    report = wait_until_idle(client)
    internal = "internal error; see the terminal of the server"
    reasons = [("a.mp4", "cannot be decoded"), ("b.mp4", internal)]
    assert report["failed"] == [{"name": name, "reason": reason} for name, reason in reasons]
    assert report["done"] == ["c.mp4"]
    assert SECRET in caplog.text


def test_files_are_added_one_at_a_time_while_others_are_received(client, index):
    index.may_add.clear()
    for number in range(4):
        assert send(client, f"{number}.mp4").status_code == 200
    report = client.get("/api/add").json()
    assert report["waiting"] == ["1.mp4", "2.mp4", "3.mp4"]
    assert report["running"] == "0.mp4"
    assert client.post("/api/search", json={"text": "a dog"}).status_code == 200
    index.may_add.set()
    assert wait_until_idle(client)["done"] == [f"{number}.mp4" for number in range(4)]


def test_files_wait_while_another_process_adds_to_the_index(client, index, monkeypatch):
    monkeypatch.setattr(adding, "RETRY_SECONDS", 0.01)
    index.busy = True
    for name in ("a.mp4", "b.mp4"):
        send(client, name)
    time.sleep(0.2)
    report = client.get("/api/add").json()
    assert {*report["waiting"], report["running"]} - {None} == {"a.mp4", "b.mp4"}
    assert report["done"] == report["failed"] == index.added == []
    index.busy = False
    report = wait_until_idle(client)
    assert (report["done"], report["failed"]) == (["a.mp4", "b.mp4"], [])


def test_server_ends_while_files_are_added_and_the_next_one_continues(index, folder):
    index.may_add.clear()
    with adding_client(index, folder) as client:
        for number in range(3):
            send(client, f"{number}.mp4")
        started = time.monotonic()
    assert time.monotonic() - started < 2
    index.may_add.set()  # lets the thread of the first server end
    other = FakeIndex([(folder / "0.mp4", 0.0, 1.0, 0.5)])
    with adding_client(other, folder) as client:
        assert wait_until_idle(client)["done"] == ["1.mp4", "2.mp4"]
    assert [Path(path).name for path in other.added] == ["1.mp4", "2.mp4"]


def test_parallel_uploads_of_one_name_are_all_saved(client, folder):
    statuses = []

    def upload(number):
        statuses.append(send(client, "dog.mp4", f"{number}".encode()).status_code)

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 4
    wait_until_idle(client)
    assert {path.read_text() for path in folder.iterdir()} == {"0", "1", "2", "3"}
    assert len(os.listdir(folder)) == 4


def test_folder_must_exist_and_be_writable(index, tmp_path):
    with pytest.raises(InputError, match=r"^--allow_add=.*nowhere: is not a folder$"):
        serve.serve(index, port=0, allow_add=tmp_path / "nowhere")


def test_rests_of_old_uploads_are_deleted(index, folder):
    for name, age in (("old", 90_000), ("new", 60)):
        (folder / f".upload-{name}.part").write_bytes(b"half a video")
        os.utime(folder / f".upload-{name}.part", (time.time() - age,) * 2)
    with adding_client(index, folder) as client:
        assert client.get("/api/add").json()["waiting"] == []
    assert os.listdir(folder) == [".upload-new.part"]
