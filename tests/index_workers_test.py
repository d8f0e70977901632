"""Tests of indexing by several workers."""

import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny
from index_adding import copies, in_thread, stored_rows
from indexes import BANK, COUNT, SECONDS, content, copied, made, model, no_processes, videos

from xclip_jax.cli import InputError
from xclip_jax.search import Index, backends, bundles, indexing
from xclip_jax.search.__main__ import main
from xclip_jax.search.backends import LocalWorkers, parse_distribution
from xclip_jax.search.store import Store

pytest.importorskip("lance", reason="pylance is not installed")
__all__ = ["copied", "in_thread", "made", "model", "no_processes", "videos"]  # the fixtures


@pytest.fixture
def like_this_process(monkeypatch):
    """Gives processes that start the devices of this one, by which a batch is split."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(indexing, "MIN_COMMIT_SECONDS", 0)
    monkeypatch.setattr(indexing, "COMMIT_FRACTION", 0)


def test_killed_worker_is_replaced_and_its_bundle_is_read_again(
    made, model, videos, tmp_path, monkeypatch, like_this_process
):
    append, kills = Store.append, []

    def append_and_kill(store, fragments, unreadable):
        append(store, fragments, unreadable)
        if fragments and not kills:
            kills.extend(multiprocessing.active_children())
            kills[0].kill()

    monkeypatch.setattr(Store, "append", append_and_kill)
    index = Index.create(tmp_path / "index", model, segment_seconds=SECONDS)
    summary = index.add(videos, workers="local:1")
    assert len(kills) == 1
    assert (summary.files, summary.segments, summary.unreadable) == (COUNT, 3 * COUNT, {})
    assert stored_rows(index.location) == 3 * COUNT
    assert content(index) == content(Index.open(made))


@pytest.mark.slow
def test_ten_kills_of_four_workers_end_with_the_index_of_one_process(
    model, videos, tmp_path, monkeypatch, like_this_process
):
    folder = copies(videos, tmp_path / "videos", 60)
    (folder / "broken.mp4").write_bytes(b"nothing")
    options = {"segment_seconds": SECONDS, "bank": BANK}
    one, several = (Index.create(tmp_path / name, model, **options) for name in "ab")
    expected = one.add(folder)
    append, rng, timers, killed = Store.append, random.Random(0), [], set()

    def kill():
        while not (alive := [p for p in multiprocessing.active_children() if p.pid not in killed]):
            time.sleep(0.01)  # until a worker is replaced
        process = rng.choice(alive)
        killed.add(process.pid)
        process.kill()

    def append_and_kill(store, fragments, unreadable):
        append(store, fragments, unreadable)
        if fragments and len(timers) < 10:
            timers.append(threading.Timer(rng.uniform(0, 0.5), kill))
            timers[-1].daemon = True
            timers[-1].start()

    monkeypatch.setattr(Store, "append", append_and_kill)
    summary = several.add(folder, workers="local:4")
    assert len(killed) == 10
    assert vars(summary) == vars(expected)
    assert content(several) == content(one)
    assert stored_rows(several.location) == len(several) == 180


def test_workers_add_what_one_process_adds(copied, videos, tmp_path, in_thread):
    folder = copies(videos, tmp_path / "videos", 8)
    (folder / "broken.mp4").write_bytes(b"nothing")
    other = Index.open(shutil.copytree(copied.location, tmp_path / "other"))
    expected, summary = copied.add(folder), other.add(folder, workers="local:2")
    assert content(other) == content(copied)
    assert vars(summary) == vars(expected)
    assert len(in_thread) > 4
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    summary = other.add(folder, workers="local:1")
    assert (summary.files, summary.removed, len(summary.unreadable)) == (8, 9, 1)
    assert stored_rows(other.location) == 3 * COUNT + 24
    assert vars(copied.add(folder)) == vars(summary)
    assert content(other) == content(copied)


def test_file_that_crashes_workers_is_reported_and_the_others_are_added(
    copied, videos, tmp_path, monkeypatch
):
    folder = copies(videos, tmp_path / "videos", 6)
    bad = str(folder / "3.mp4")

    def run(self, function, jobs, done):
        for index, job in enumerate(jobs):
            done(index, None if bad in job.stamps else function(job))
            done(index, function(job))  # a machine that was believed lost: too late

    monkeypatch.setattr(LocalWorkers, "run", run)
    summary = copied.add(folder, workers="local:1")
    assert summary.unreadable == {bad: indexing.WORKERS_CRASHED}
    assert (summary.files, summary.segments) == (5, 15)
    assert stored_rows(copied.location) == 3 * COUNT + 15


def test_bundles_are_bounded_and_have_each_file_once(copied, monkeypatch):
    stamps = {f"/videos/{n}.mp4": (n, 1) for n in range(1000)}
    for slots in (None, 1, 7, 500):
        made = bundles.make_bundles(copied._store, stamps, slots, "model")
        assert max(len(bundle.stamps) for bundle in made) <= bundles.MAX_FILES
        assert len(made) >= min(1000, 4 * (slots or 0))
        paths = [path for bundle in made for path in bundle.stamps]
        assert sorted(paths) == sorted(stamps)
        assert paths != sorted(stamps)
    monkeypatch.setattr(bundles, "MAX_BYTES", 1000)
    made = bundles.make_bundles(copied._store, stamps, None, "model")
    assert max(sum(size for size, _ in bundle.stamps.values()) for bundle in made) <= 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": "local:0"}, "--workers=local:0: must be from local:1 to local:256"),
        ({"workers": "local:x"}, "must be from local:1"),
        ({"workers": "local"}, "must be from local:1"),
        ({"workers": "spark"}, "--workers=spark: must be local:N, ray, ray://HOST:PORT"),
        ({"shard": "4/4"}, r"--shard=4/4: must be i/n with 0 <= i < n"),
        ({"shard": "a"}, "--shard=a: must be"),
        ({"shard": "-1/4"}, "--shard=-1/4: must be"),
        ({"beam_runner": "FlinkRunner"}, "require --workers=beam"),
    ],
)
def test_invalid_options_are_errors(copied, videos, options, message):
    with pytest.raises(InputError, match=message):
        copied.add(videos, **options)


def test_command_adds_a_shard_on_workers(model, videos, tmp_path, in_thread, capsys):
    index = str(tmp_path / "index")
    command = ["index", str(videos), f"--index={index}", f"--model={model}", "--segment_seconds=2"]
    with pytest.raises(SystemExit, match="--shard=2/2: must be i/n"):
        main([*command, "--shard=2/2"])
    assert not Path(index).exists()
    for number in range(2):
        main([*command, "--workers=local:1", f"--shard={number}/2"])
    assert capsys.readouterr().out.endswith(f"{3 * COUNT} segments of {COUNT} files\n")
    assert sorted(path for paths in in_thread for path in paths) == sorted(
        map(str, videos.iterdir())
    )


@pytest.fixture
def ctrl_c():
    """Lets SIGINT interrupt: a process that a shell has started in the background ignores it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # a KeyboardInterrupt would be lost in a callback of JAX
    yield
    gc.enable()
    signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("on_workers", [False, True])
def test_ctrl_c_and_sigterm_commit_what_was_read(
    model, videos, tmp_path, on_workers, number, monkeypatch, ctrl_c
):
    def read_and_terminate(function, jobs, done):
        for index, job in enumerate(jobs):
            done(index, function(job))
        os.kill(os.getpid(), number)
        time.sleep(10)

    def run(self, function, jobs, done):
        read_and_terminate(function, jobs, done)

    monkeypatch.setattr(LocalWorkers, "run", run)
    monkeypatch.setattr(indexing, "run_jobs", read_and_terminate)
    monkeypatch.setattr(indexing, "MIN_COMMIT_SECONDS", 1000)
    index, former = str(tmp_path / "index"), signal.getsignal(signal.SIGTERM)
    command = ["index", str(videos), f"--index={index}", f"--model={model}", "--segment_seconds=2"]
    with pytest.raises(SystemExit, match="interrupted"):
        main([*command, *(["--workers=local:1"] if on_workers else [])])
    assert signal.getsignal(signal.SIGTERM) == former
    # One process encodes eight segments at once, so the third file waits for further ones.
    assert len(Index.open(index)) == 3 * (COUNT if on_workers else 2)


@pytest.mark.parametrize(
    ("text", "module", "extra"),
    [
        ("local:2", "lance", "workers"),
        ("ray", "lance", "ray"),
        ("ray", "ray", "ray"),
        ("beam", "apache_beam", "workers,beam"),
    ],
)
def test_missing_extra_is_an_error(text, module, extra, monkeypatch):
    find_spec = backends.importlib.util.find_spec
    missing = lambda name: None if name == module else find_spec(name)  # noqa: E731
    monkeypatch.setattr(backends.importlib.util, "find_spec", missing)
    with pytest.raises(InputError, match=rf"pip install -e '\.\[{extra}\]'"):
        parse_distribution("index", workers=text)


def test_addresses_of_ray_are_parsed():
    pytest.importorskip("ray")
    for text, address in (
        ("ray", None),
        ("ray://head:10001", "ray://head:10001"),
        ("ray:auto", "auto"),
        ("ray:head:6379", "head:6379"),
    ):
        assert parse_distribution("index", workers=text)[1].address == address


def test_worker_with_another_model_is_an_error(copied, videos, tmp_path):
    other = tiny.make_model(tmp_path / "model", seed=1)
    about = json.dumps(copied.about)
    bundle = bundles.Bundle(copied.location, str(other), about, {})
    with pytest.raises(InputError, match="is another model on a worker"):
        bundles.encode_bundle(bundle)
