"""Tests of an index whose parts are held by processes of a Ray cluster."""

import json

import pytest
from indexes import COUNT, SECONDS, model, no_processes, videos
from network import run_isolated

from xclip_jax.search import Index

__all__ = ["model", "no_processes", "videos"]  # fixtures


@pytest.mark.parametrize(
    ("parts", "queries", "patience"),  # a busy machine may take longer than the limits of users
    [(2, 60, 6), *(pytest.param(n, 200, 1, marks=pytest.mark.slow) for n in (2, 4))],
)
def test_parts_answer_like_one_process(model, videos, tmp_path, parts, queries, patience):
    index = Index.create(tmp_path / "index", model, segment_seconds=SECONDS)
    *films, last = sorted(videos.iterdir())
    for film in films:  # a fragment each
        index.add(film)
    arguments = index.location, parts, queries, last, patience
    done = run_isolated("sharded_serving.py", *arguments, timeout=400, JAX_NUM_CPU_DEVICES="1")
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["sizes"] == {2: [6, 6], 4: [3] * 4}[parts]
    assert facts["equal"] == queries
    for name in ("like", "heat_map", "thumbnail", "segment", "films", "whole", "added"):
        assert facts[name] is True, name
    assert facts["files"] == [COUNT - 1] * 2
    seconds, missing, note = facts["first"]
    if patience == 1:
        assert (missing, note) == (1, "incomplete: a shard of the index did not answer")
    assert max(seconds, facts["slowest"]) < 2 * patience
    assert facts["whole_after"] < 15 * patience
    assert facts["refreshed"] == [True, True, False]
    assert facts["segments"] == [3 * COUNT] * 2


@pytest.mark.slow
def test_front_ends_do_not_touch_the_parts_of_living_ones(model, videos, tmp_path):
    index = Index.create(tmp_path / "index", model, segment_seconds=SECONDS)
    index.add(videos)
    done = run_isolated("sharded_fronts.py", index.location, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = [str(3 * COUNT), "0"]
    facts = next(line for line in done.stdout.splitlines() if line.startswith("{"))  # Ray prints
    assert json.loads(facts) == {
        "both": [whole, whole],
        "deployed": [2, 2],
        "after_kill": [whole, whole],
        "orphans_deleted": [2, 2],
        "after_ctrl_c": [whole, [2]],
    }
