"""Tests of an index in a bucket: the same answers as in a folder, by few requests."""

import os
import subprocess
import sys

import pytest
from indexes import COUNT, SECONDS, made, model, no_processes, videos
from s3 import s3

from xclip_jax.cli import InputError
from xclip_jax.search import Index
from xclip_jax.search.calibration import Calibration
from xclip_jax.search.passages import Found, Passages
from xclip_jax.search.store import Store, exists

__all__ = ["made", "model", "no_processes", "s3", "videos"]  # fixtures
MOST = 30  # requests of a query


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XCLIP_JAX_CACHE", str(tmp_path / "cache"))


def answers(index):
    return [index.query(text, k=15).hits for text in ("a red dog", "a blue cat", "and")]


def test_index_in_a_bucket_is_made_searched_and_updated(made, model, videos, s3, cache):
    location = f"{s3.uri}/index"
    index = Index.create(location, model, segment_seconds=SECONDS)
    for video in sorted(videos.iterdir()):  # a fragment each
        index.add(video)
    expected = answers(Index.open(made))
    opened = Index.open(location)
    opened.retriever.encode_text(["a"])
    s3.requests.clear()
    first = opened.query("a red dog", k=15)
    cold = len(s3.requests)
    s3.requests.clear()
    assert opened.query("a red dog", k=15).hits == first.hits
    warm = len(s3.requests)
    assert (0 < cold <= MOST, warm) == (True, 0), (cold, warm)
    assert len(answers(opened)) == len(expected)
    for found, right in zip(answers(opened), expected, strict=True):
        assert [hit.id for hit in found] == [hit.id for hit in right]
        scores = [hit.score for hit in found]
        assert scores == pytest.approx([hit.score for hit in right], abs=1e-5)
    s3.requests.clear()
    assert not opened.refresh()
    assert len(s3.requests) <= 5
    summary = Index.open(location).add(videos)  # a second run finds nothing new
    assert (summary.files, summary.unchanged) == (0, COUNT)
    assert opened.num_segments == 3 * COUNT


def test_table_without_its_first_version_is_not_yet_there(s3):
    location, seen = f"{s3.uri}/index", {}
    readers = {
        "segments": lambda: exists(location),
        "calibration": lambda: Store(location).calibration(),
        "passages": lambda: Passages(location).sources,
    }

    def read(method, path):
        name = path.removeprefix(f"/{s3.name}/index/").partition(".lance/_versions/")[0]
        if method == "PUT" and name in readers and name not in seen:
            seen[name] = "running"
            seen[name] = readers[name]()

    s3.hook = read
    store = Store.create(location, {"max_frames": 2, "embed_dim": 4, "precision": "float32"})
    store.save_calibration(Calibration(examples=("a dog",)))
    store.passages.add("subtitles", [Found("/clip.mp4", (1, 1, ""), {})])
    assert seen == {"segments": False, "calibration": Calibration(), "passages": frozenset()}
    assert exists(location)
    assert Store(location).calibration().examples == ("a dog",)
    assert Store(location).passages.paths() == {"/clip.mp4"}


def test_bucket_out_of_reach_is_an_error_that_says_what_to_set(s3, monkeypatch):
    with pytest.raises(InputError, match=r"nowhere.*: no such|nowhere.*set AWS_ACCESS_KEY_ID"):
        Index.open("s3://nowhere/index")
    s3.hook = lambda method, path: 403
    with pytest.raises(InputError, match=r"cannot be accessed: .*set AWS_ACCESS_KEY_ID"):
        Index.open(f"{s3.uri}/index")


def test_http_endpoint_needs_no_further_variable():
    code = "import os, xclip_jax.search; print(os.environ['AWS_ALLOW_HTTP'])"
    environment = os.environ | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    environment.pop("AWS_ALLOW_HTTP", None)
    options = {"env": environment, "capture_output": True, "text": True, "check": True}
    assert subprocess.run([sys.executable, "-c", code], **options).stdout == "true\n"
