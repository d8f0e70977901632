"""An indexing run that is killed again and again ends with the index of an uninterrupted one."""

import random
import shutil
import subprocess
import sys
import time

import pytest
import tiny

from xclip_jax.search import Index

# Threads for processes, which take seconds to start; a commit after every file.
RUN = """
import concurrent.futures, sys
from xclip_jax import workers
from xclip_jax.search import Index, indexing
from xclip_jax.search.store import Store, exists
workers.worker_pool = concurrent.futures.ThreadPoolExecutor
indexing.COMMIT_SECONDS = indexing.COMMIT_SHARE = 0
folder, model, videos = sys.argv[1:]
index = Index.open(folder) if exists(folder) else Index.create(folder, model, segment_seconds=2)
index.retriever
commit = Store.add
Store.add = lambda store, rows: (commit(store, rows), print("committed", flush=True))
index.add([videos])
"""


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def content(folder):
    rows = [row for table in Index.open(folder).tables() for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row["id"])


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random(tmp_path, kills):
    model, videos = tiny.make_model(tmp_path / "model"), tmp_path / "videos"
    clips = tiny.make_videos(videos, 8)
    for number in range(40):
        shutil.copy(clips[number % 8], videos / f"copy{number}.mp4")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    commits = start(whole, model, videos).communicate()[0].count("committed")
    assert commits > 20
    rng, kept = random.Random(0), [0]
    for _ in range(kills):
        process = start(stopped, model, videos)
        for _ in range(rng.randint(1, commits // (kills + 1))):
            assert process.stdout.readline() == "committed\n"
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        assert process.wait() == -9
        rows = content(stopped)
        kept.append(len(rows))
        for path in {row["path"] for row in rows}:
            assert sum(row["path"] == path for row in rows) == 3
    assert kept == sorted(set(kept))  # nothing that was committed is lost
    assert kept[-1] < 3 * 48
    assert start(stopped, model, videos).wait() == 0
    assert content(stopped) == content(whole)
    assert len(content(whole)) == 3 * 48
