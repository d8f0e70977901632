"""Test of indexing on a Ray cluster of this machine."""

import pytest
from indexes import COUNT, SECONDS, content, made, model, no_processes, videos
from network import run_isolated

from xclip_jax.search import Index

__all__ = ["made", "model", "no_processes", "videos"]  # the fixtures


@pytest.mark.slow
def test_ray_indexes_like_one_process_though_a_worker_is_killed(made, model, videos, tmp_path):
    pytest.importorskip("lance", reason="pylance is not installed")
    index = Index.create(tmp_path / "index", model, segment_seconds=SECONDS)
    arguments = index.location, videos
    done = run_isolated("ray_indexing.py", *arguments, timeout=300, JAX_NUM_CPU_DEVICES="2")
    assert done.stdout.endswith(f"{COUNT} files 1 killed\n"), done.stdout + done.stderr
    index.refresh()
    assert content(index) == content(Index.open(made))
