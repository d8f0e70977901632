"""Tests of indexing runs that are killed."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from xclip_jax.search import Index

# Without processes, which take seconds to start, and with a commit after every file.
RUN = """
import sys
sys.path.append(sys.argv[4])
import tiny
from xclip_jax.search import Index, indexing
from xclip_jax.search.store import Store, exists
indexing.run_jobs = tiny.run_jobs_here
indexing.MIN_COMMIT_SECONDS = indexing.COMMIT_FRACTION = 0
folder, model, videos = sys.argv[1:4]
options = {"segment_seconds": 2, "bank": [f"a dog {n}" for n in range(100)]}
index = Index.open(folder) if exists(folder) else Index.create(folder, model, **options)
index.retriever
commit = Store.add

def add(store, segments, unreadable):
    commit(store, segments, unreadable)
    if segments:
        print("committed", flush=True)

Store.add = add
index.add([videos])
"""


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, arguments), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def content(folder):
    rows = [row for table in Index.open(folder).tables() for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row["id"])


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 10])
def test_killed_runs_end_with_the_index_of_an_uninterrupted_run(tmp_path, kills):
    model, videos = tiny.make_model(tmp_path / "model"), tmp_path / "videos"
    num_files = 8 * (1 + kills // 2)
    clips = tiny.make_videos(videos, 8)
    for number in range(8, num_files):
        shutil.copy(clips[number % 8], videos / f"copy{number}.mp4")
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    commits = start(uninterrupted, model, videos).communicate()[0].count("committed")
    assert commits > num_files // 2
    rng, counts = random.Random(0), [0]
    for _ in range(kills):
        process = start(killed, model, videos)
        for _ in range(rng.randint(1, commits // (kills + 1))):
            assert process.stdout.readline() == "committed\n"
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        assert process.wait() == -9
        rows = content(killed)
        counts.append(len(rows))
        for path in {row["path"] for row in rows}:
            assert sum(row["path"] == path for row in rows) == 3
    assert counts == sorted(set(counts))  # every run has added segments, and none were lost
    assert counts[-1] < 3 * num_files
    assert start(killed, model, videos).wait() == 0
    assert content(killed) == content(uninterrupted)
    assert len(content(killed)) == 3 * num_files
