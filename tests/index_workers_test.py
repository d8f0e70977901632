"""Tests of indexing by several workers, and by the shards of a job array."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import tiny
import workers_functions
from filelock import FileLock
from indexes import BANK, COUNT, SECONDS, content, copied, made, model, no_processes, videos

from xclip_jax import workers
from xclip_jax.cli import InputError
from xclip_jax.search import Index, backends, bundles, indexing, repeats, store
from xclip_jax.search.__main__ import main
from xclip_jax.search.backends import LocalWorkers, parse_distribution
from xclip_jax.search.job_array import ArrayShard, BusyError, lock_files
from xclip_jax.search.passages import Passages
from xclip_jax.search.store import Store

pytest.importorskip("lance", reason="pylance is not installed")
__all__ = ["copied", "made", "model", "no_processes", "videos"]  # the fixtures


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


def run_jobs(function, jobs, processes=2):
    results = {}

    def done(index, result):
        assert index not in results
        results[index] = result

    workers.run_on_processes(function, jobs, done, processes=processes)
    assert not multiprocessing.active_children()
    return [results[index] for index in range(len(jobs))]


def test_processes_last_and_a_killed_one_is_replaced(tmp_path):
    pids = run_jobs(workers_functions.kill_once, ["", "", str(tmp_path / "a"), "", "", ""], 1)
    assert len(set(pids)) == 2
    assert None not in pids


def test_job_that_kills_its_process_each_time_has_no_result():
    assert run_jobs(workers_functions.kill_always, ["a", "bad", "b"]) == ["a", None, "b"]


def test_exception_of_a_job_is_raised_and_ends_the_processes():
    with pytest.raises(OSError, match="No space left on device: 7"):
        run_jobs(workers_functions.fail, [7])
    assert not multiprocessing.active_children()


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


@pytest.mark.parametrize(
    ("text", "module", "extra"), [("local:2", "lance", "workers"), ("ray", "ray", "ray")]
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


def test_every_file_is_in_one_shard():
    paths = [f"/videos/{n}.mp4" for n in range(1000)]
    shards = [ArrayShard.parse(f"{n}/4") for n in range(4)]
    parts = [[path for path in paths if path in shard] for shard in shards]
    assert sorted(path for part in parts for path in part) == sorted(paths)
    assert min(map(len, parts)) > 200
    assert all(path in ArrayShard() for path in paths)


def test_shards_are_written_at_the_same_time_and_alone_otherwise(tmp_path):
    location = str(tmp_path)
    busy = pytest.raises(BusyError, match="another process is adding")
    with lock_files(location, ArrayShard(0, 4)), lock_files(location, ArrayShard(1, 4)):
        for other in (ArrayShard(), ArrayShard(0, 4), ArrayShard(2, 3), ArrayShard(0, 14)):
            with busy, lock_files(location, other):
                pass
    with lock_files(location, ArrayShard()):
        for other in (ArrayShard(), ArrayShard(0, 4)):
            with busy, lock_files(location, other):
                pass
    for shard in (ArrayShard(2, 3), ArrayShard(), ArrayShard(0, 4)):
        with lock_files(location, shard):
            pass


def test_second_run_on_a_folder_is_busy(copied, videos, in_thread):
    with FileLock(Path(copied.location, "writer.lock")), pytest.raises(BusyError):
        copied.add(videos, workers="local:2")
    with FileLock(Path(copied.location, "writer-1-of-2.lock")), pytest.raises(BusyError):
        copied.add(videos)


@pytest.mark.parametrize("is_bucket", [False, True])
def test_shards_together_add_every_file_once(
    bucket, copied, model, videos, tmp_path, is_bucket, monkeypatch
):
    monkeypatch.setattr(indexing, "MIN_COMMIT_SECONDS", 0)
    monkeypatch.setattr(indexing, "COMMIT_FRACTION", 0)
    folder = copies(videos, tmp_path / "videos", 12)
    (folder / "broken.mp4").write_bytes(b"nothing")
    for number in range(12):
        srt = folder / f"{number}.srt"
        srt.write_text(f"1\n00:00:00,000 --> 00:00:02,000\nline {number}\n")
    location = bucket.location if is_bucket else copied.location
    before = stored_rows(location)
    barrier = threading.Barrier(3)

    def add(number):
        index = Index.open(location)
        barrier.wait()
        return index.add(folder, shard=f"{number}/3")

    parts = run_together(*(lambda n=n: add(n) for n in range(3)))
    assert sum(part.files for part in parts) == 12
    assert sum(part.texts for part in parts) == 12
    assert [len(part.unreadable) for part in parts].count(1) == 1
    assert stored_rows(location) == before + 36
    index = Index.open(location)
    assert index.num_segments == before + 36
    again = index.add(folder)
    assert (again.files, again.unchanged, again.texts) == (0, 12, 0)
    assert len(Passages(location).files("subtitles")) >= 12


def test_shard_prunes_its_own_files(copied, videos, tmp_path):
    folder = copies(videos, tmp_path / "videos", 12)
    copied.add(folder)
    for number in range(11):
        (folder / f"{number}.mp4").unlink()
    removed = [copied.add(folder, prune=True, shard=f"{n}/2").removed for n in range(2)]
    assert sum(removed) == 11
    assert min(removed) > 0


@pytest.mark.parametrize("spec", [None, "local:2"])
def test_same_files_added_twice_at_a_time_to_a_bucket_count_once(
    bucket, model, videos, spec, in_thread, monkeypatch, tmp_path
):
    barrier = threading.Barrier(2, timeout=60)
    name = "append" if spec else "add"
    commit, location = getattr(Store, name), bucket.location
    counts = []

    def commit_together(store, *rows):
        barrier.wait()  # both have found that the files are new
        commit(store, *rows)
        barrier.wait()
        counts.append((stored_rows(location), len(Index.open(location))))
        barrier.wait()

    monkeypatch.setattr(Store, name, commit_together)
    parts = run_together(*[lambda: Index.open(location).add(videos, workers=spec)] * 2)
    assert [part.segments for part in parts] == [3 * COUNT] * 2
    if spec:
        assert counts == [(6 * COUNT, 3 * COUNT)] * 2
    assert stored_rows(location) == len(Index.open(location)) == 3 * COUNT
    alone = Index.create(tmp_path / "alone", model, segment_seconds=SECONDS)
    monkeypatch.undo()
    monkeypatch.setattr(indexing, "run_jobs", tiny.run_jobs_here)
    alone.add(videos)
    assert content(Index.open(location)) == content(alone)


def test_workers_and_shards_add_to_an_s3_bucket(model, videos, tmp_path, monkeypatch, in_thread):
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        variables = {
            "ENDPOINT": f"http://{host}:{port}",
            "ALLOW_HTTP": "true",
            "REGION": "us-east-1",
        }
        variables |= {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
        for name, value in variables.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        location = "s3://bucket/index"
        request = urllib.request.Request(f"{variables['ENDPOINT']}/bucket", method="PUT")
        urllib.request.urlopen(request).close()
        Index.create(location, model, segment_seconds=SECONDS)
        options = [{"shard": "0/2"}, {"shard": "1/2", "workers": "local:1"}, {}]
        run_together(*(lambda o=o: Index.open(location).add(videos, **o) for o in options))
        index = Index.open(location)
        assert index.add(videos).unchanged == COUNT
        assert stored_rows(location) == len(index) == 3 * COUNT
    finally:
        server.stop()


def test_rows_are_kept_if_two_processes_delete_each_others_copies(copied, monkeypatch):
    table = Store(copied.location)._segments
    rows = table.to_arrow()
    table.add(rows)
    before = content(copied)
    find = repeats.repeated_rows

    def find_and_wait(table, names):
        repeated = find(table, names)
        other = Store(copied.location)._segments  # which deletes the first copies
        ids = other.search().select(["id"]).with_row_id(True).to_arrow()["_rowid"].to_pylist()
        others = set(ids) - set(repeated.to_pylist())
        other.delete(f"_rowid IN ({', '.join(map(str, others))})")
        return repeated

    monkeypatch.setattr(repeats, "repeated_rows", find_and_wait)
    Store(copied.location).compact()
    monkeypatch.undo()
    assert stored_rows(copied.location) == 3 * COUNT
    assert content(Index.open(copied.location)) == before


def test_conflicting_commit_is_repeated(monkeypatch):
    monkeypatch.setattr(store.random, "uniform", lambda low, high: 0)
    attempts = []

    def conflict():
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("conflict")

    store.retry_commit(conflict)
    assert len(attempts) == 3
    attempts.clear()
    monkeypatch.setattr(store, "MAX_COMMITS", 2)
    with pytest.raises(OSError, match="conflict"):
        store.retry_commit(conflict)


def test_worker_with_another_model_is_an_error(copied, videos, tmp_path):
    other = tiny.make_model(tmp_path / "model", seed=1)
    about = json.dumps(copied.about)
    bundle = bundles.Bundle(copied.location, str(other), about, {})
    with pytest.raises(InputError, match="is another model on a worker"):
        bundles.encode_bundle(bundle)


def test_workers_end_with_the_process_that_started_them():
    script = (
        "import sys; sys.path.append(sys.argv[1]); import workers_functions\n"
        "from xclip_jax import workers\n"
        "workers.run_on_processes(workers_functions.sleep, [0, 1], print, processes=2)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    process = subprocess.Popen(command)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list child processes")
    deadline = time.monotonic() + 30
    while len(pids := children.read_text().split()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)  # until they watch their parent
    pids = children.read_text().split()
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
