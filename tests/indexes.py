"""Fixtures with an index of a few videos, encoded by a small random model."""

import shutil

import pytest
import tiny

from xclip_jax.search import Index, indexing, timed_text

COUNT, SECONDS = 5, 2  # clips of six seconds: three segments each
BANK = [f"a {c} {a}{n}" for c in ("red", "blue") for a in ("dog", "cat", "and") for n in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    tiny.make_videos(folder, COUNT)
    return folder


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    for module in (indexing, timed_text):
        monkeypatch.setattr(module, "run_jobs", tiny.run_jobs_here)


@pytest.fixture(scope="module")
def made(tmp_path_factory, model, videos):
    """Makes the folder of an index that tests do not change."""
    folder = tmp_path_factory.mktemp("index") / "index"
    index = Index.create(folder, model, segment_seconds=SECONDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "run_jobs", tiny.run_jobs_here)
        index.add([videos])
    return folder


@pytest.fixture(scope="module")
def made_with_bank(tmp_path_factory, model, videos):
    """Makes the folder of an index with a bank, which tests do not change."""
    folder = tmp_path_factory.mktemp("banked") / "index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "run_jobs", tiny.run_jobs_here)
        Index.create(folder, model, segment_seconds=SECONDS, bank=BANK).add([videos])
    return folder


@pytest.fixture(scope="module")
def index(made):
    return Index.open(made)


@pytest.fixture
def copied(made, tmp_path):
    """Copies the index, which the test may then change."""
    return Index.open(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture
def one_clip(videos, tmp_path):
    """Makes a folder with clip0.mp4 only."""
    (tmp_path / "more").mkdir()
    shutil.copy(videos / "clip0.mp4", tmp_path / "more")
    return tmp_path / "more"


def content(index):
    """Returns {id: (path, start, end, video vector, frame vectors, bias or None)}."""
    rows = {}
    for table in index.tables():
        for row in table.to_pylist():
            names = ("path", "start", "end", "video", "frames", "bias")
            rows[row["id"]] = tuple(map(row.get, names))
    return rows
