"""Tests of indexing on Apache Beam, which `.ci/beam` installs before it runs them."""

import pytest
from indexes import COUNT, SECONDS, content, made, model, no_processes, videos

from xclip_jax.cli import InputError
from xclip_jax.search import Index

pytest.importorskip("apache_beam", reason="Apache Beam is not installed: see .ci/beam")
pytest.importorskip("lance", reason="pylance is not installed")
__all__ = ["made", "model", "no_processes", "videos"]  # the fixtures


def test_beam_indexes_like_one_process(made, model, videos, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    (videos / "broken.mp4").write_bytes(b"nothing")
    index = Index.create(tmp_path / "index", model, segment_seconds=SECONDS)
    try:
        summary = index.add(videos, workers="beam", beam_runner="DirectRunner")
        again = index.add(videos, workers="beam")
    finally:
        (videos / "broken.mp4").unlink()
    assert (summary.files, summary.segments) == (COUNT, 3 * COUNT)
    assert len(summary.unreadable) == 1
    assert (again.files, again.unchanged) == (0, COUNT)
    assert content(index) == content(Index.open(made))
    assert not list((tmp_path / "index").glob("beam*"))


def test_index_in_a_bucket_is_an_error(model, videos, tmp_path):
    index = Index.create(f"file://{tmp_path}/bucket", model)
    with pytest.raises(InputError, match="--index must be a folder that all machines share"):
        index.add(videos, workers="beam")
