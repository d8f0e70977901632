"""Tests of the readers of batches: equal batches, ends of worker processes, the measured choice."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from xclip_jax.data import readers
from xclip_jax.data.builder import Dataset
from xclip_jax.data.pipeline import FOUR_THREADS, Readers, TrainingPairs, training_batches
from xclip_jax.data.readers import choose_readers, measure_rate
from xclip_jax.data.text import load_tokenizer

WORKERS = Readers(threads=2, workers=2)
MUCH = {"batch_size": 300, "clip_bytes": 2 * 10**6, "steps": 1000}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


def open_batches(data, chosen, **options):
    dataset = Dataset(data)
    pairs = TrainingPairs(dataset, "train", "random")
    inputs = pairs, load_tokenizer(f"{data}/tokenizer", 8), 4, 4, dataset.format
    return training_batches(*inputs, seed=3, readers=chosen, **options)


def read(data, chosen, count=7):
    with contextlib.closing(open_batches(data, chosen, start_step=2, process=(1, 2))) as batches:
        return list(itertools.islice(batches, count))


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], name)


def test_batches_are_the_same_for_any_number_of_threads(data):
    expected = read(data, Readers(1))
    assert not np.array_equal(expected[0]["frames"], expected[1]["frames"])
    for threads in (2, 16):
        assert_same(read(data, Readers(threads)), expected)


def test_workers_yield_the_same_batches_ignore_signals_and_end_on_close(data):
    expected = read(data, FOUR_THREADS, 9)
    with contextlib.closing(open_batches(data, WORKERS, start_step=2, process=(1, 2))) as batches:
        found = [next(batches)]
        started = multiprocessing.active_children()
        assert len(started) == 2
        for process, number in itertools.product(started, (signal.SIGINT, signal.SIGTERM)):
            os.kill(process.pid, number)  # as to all processes of a job
        found += itertools.islice(batches, 8)
    assert_same(found, expected)
    assert not any(process.is_alive() for process in started)


KILLED = """
import multiprocessing, os, signal, sys
sys.path.insert(0, {tests!r})
import readers_test

if __name__ == "__main__":
    batches = readers_test.open_batches({data!r}, readers_test.WORKERS)
    next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_when_their_parent_is_killed(data, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent), data=str(data)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, script]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=90)
    assert ended.returncode == -signal.SIGKILL
    pids = ended.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, pids))


class Slow:
    """Batches that take 10 ms each."""

    closed = False

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(0.01)

    def close(self):
        self.closed = True


def test_rate_is_that_of_the_clips_and_the_batches_are_closed(monkeypatch):
    monkeypatch.setattr(readers, "SECONDS", 0.2)
    opened = Slow()
    assert 80 < measure_rate(lambda *_: opened, FOUR_THREADS, 8) <= 800
    assert opened.closed


def choose(monkeypatch, rates, cores=16, **options):
    """Returns the choice by given rates, and the (readers, clips of a batch) that were measured."""
    measured = []

    def standin(_, chosen, size):
        measured.append((chosen, size))
        if isinstance(rates[chosen], Exception):
            raise rates[chosen]
        return rates[chosen]

    monkeypatch.setattr(readers, "measure_rate", standin)
    options = MUCH | options
    sizes = options.pop("batch_size"), options.pop("clip_bytes")
    return choose_readers(lambda *_: None, *sizes, cores=cores, **options), measured


@pytest.mark.parametrize("limit", [{"cores": 2}, {"cores": 4}, {"steps": 100}, {"clip_bytes": 9}])
def test_nothing_is_measured_where_it_cannot_matter(monkeypatch, capsys, limit):
    assert choose(monkeypatch, {}, **limit) == (FOUR_THREADS, [])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("cores", "rates", "threads"),
    [
        (16, {4: 400, 8: 790, 16: 1500}, 16),
        (16, {4: 400, 8: 900, 16: 920}, 8),
        (6, {4: 1000, 6: 1050}, 4),
        (12, {4: 400, 8: 800, 12: 1200}, 12),
        (96, {4: 1000, 8: 2000, 16: 4000, 32: 8000, 64: 15000}, 64),
    ],
)
def test_the_fewest_threads_near_the_highest_rate_are_chosen(
    monkeypatch, capsys, cores, rates, threads
):
    found, measured = choose(monkeypatch, {Readers(n): rates[n] for n in rates}, cores)
    assert found == Readers(threads)
    assert measured == [(Readers(n), 64) for n in rates]
    assert capsys.readouterr().out == f"input: {threads} threads, {rates[threads]:,} clips/s\n"


THREADS = {Readers(4): 1000.0, Readers(8): 1200.0, Readers(16): 1200.0}


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (4000.0, "input: 4 processes of 4 threads, 4,000 clips/s\n"),
        (1250.0, "input: 8 threads, 1,200 clips/s\n"),
        (
            RuntimeError("Worker process was terminated\nat 5"),
            "note: no worker processes for the input: Worker process was terminated\n"
            "input: 8 threads, 1,200 clips/s\n",
        ),
    ],
)
def test_workers_are_chosen_where_threads_do_not_scale(monkeypatch, capsys, rate, text):
    monkeypatch.setattr(readers, "SHARED_MEMORY", "/")
    workers = Readers(4, 4)
    found, measured = choose(monkeypatch, THREADS | {workers: rate}, clip_bytes=10**6)
    assert found == (workers if rate == 4000 else Readers(8))
    assert measured[-1] == (workers, 300)
    assert capsys.readouterr().out == text


def test_workers_without_enough_shared_memory_are_not_started(monkeypatch, capsys):
    found, measured = choose(monkeypatch, THREADS, clip_bytes=10**13)
    assert found == Readers(8)
    assert Readers(4, 4) not in dict(measured)
    assert "no worker processes for the input: " in (text := capsys.readouterr().out)
    assert "GiB free in /dev/shm, 33527612.7 needed" in text


def make_rows(bare, ours, undecoded):
    """Returns rows of the benchmark from the clips per second on one and two cores."""
    rates = [("bare", 4, bare), ("ours", 4, ours), ("undecoded", 1, [undecoded])]
    return [
        {"side": side, "threads": threads, "cores": cores, "clips_s": rate}
        for side, threads, some in rates
        for cores, rate in enumerate(some, 1)
    ]


@pytest.mark.parametrize(
    ("bare", "ours", "serial", "rate"),
    [
        ([400, 800], [400, 800], 1 / 4000, 12 / (1 / 4000 + 9 / 4000 / 16)),  # only Python's lock
        ([400, 600], [400, 600], 1 / 4000, 12 / (1 / 4000 + 9 / 4000 / 12)),  # a slower second core
        ([400, 800], [400, 640], 1 / 1600, 12 / (1 / 1600 + 3 / 1600 / 16)),  # a fifth is lost
    ],
)
def test_benchmark_extrapolates_by_amdahls_law(monkeypatch, bare, ours, serial, rate):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import input_pipeline

    found = input_pipeline.extrapolate(make_rows(bare, ours, 4000), 0.3, 3600)
    assert found["serial_ms"] == pytest.approx(1e3 * serial)
    assert found["frames_s_16_cores"] == pytest.approx(rate)
    assert found["gpu_frames_s"] == pytest.approx(12000)
    speed = bare[1] / bare[0] / 2
    parallel = (1 / 400 - serial) / speed
    assert serial + parallel / found["cores_per_gpu"] == pytest.approx(1 / 1000)
