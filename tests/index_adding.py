"""Fixtures and functions of tests in which several processes or threads add files to an index."""

import json
import shutil
import threading

import pytest
from indexes import COUNT, SECONDS

from xclip_jax.search import Index
from xclip_jax.search.backends import LocalWorkers
from xclip_jax.search.store import Store


@pytest.fixture
def in_thread(monkeypatch):
    """Runs the jobs of workers in this thread, one after another, and returns their paths."""
    lock, paths = threading.Lock(), []

    def run(self, function, jobs, done):
        for index, job in enumerate(jobs):
            paths.append(sorted(job.stamps))
            with lock:  # the encoder of a process serves one thread
                result = json.loads(json.dumps(function(job)))
            done(index, result)

    monkeypatch.setattr(LocalWorkers, "run", run)
    return paths


@pytest.fixture
def bucket(model, tmp_path):
    """Makes an empty index at a URI: it has no locks."""
    return Index.create(f"file://{tmp_path}/bucket", model, segment_seconds=SECONDS)


def run_together(*functions):
    """Runs functions in threads and returns their results, or raises the first exception."""
    results = {}

    def run(number):
        try:
            results[number] = functions[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return [results[number] for number in range(len(functions))]


def stored_rows(location):
    """Returns the number of rows, repeated ones included."""
    return Store(location)._segments.count_rows()


def copies(videos, folder, count):
    """Makes a folder of copies of the clips."""
    folder.mkdir()
    for number in range(count):
        shutil.copy(videos / f"clip{number % COUNT}.mp4", folder / f"{number}.mp4")
    return folder
