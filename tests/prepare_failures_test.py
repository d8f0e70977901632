"""Tests of preparing from missing, corrupted and changed videos."""

import concurrent.futures
import hashlib
import json
import os
import re
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
from preparing import annotate, cut_off, failures, in_thread, levels, make_video, records, run

from xclip_jax import prepare, workers
from xclip_jax.cli import InputError
from xclip_jax.data import extraction
from xclip_jax.data.annotations import Clip, Listing
from xclip_jax.data.builder import Dataset
from xclip_jax.data.preprocess import FrameFormat

__all__ = ["in_thread"]  # the fixture

REAL_EXTRACT = extraction.extract


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_corrupted_cache_file_is_made_again(tmp_path, damage):
    make_video(tmp_path / "a.mp4")
    job = extraction.make_job(
        Clip("a", ("x",), "train"), tmp_path / "a.mp4", FrameFormat(32), None, tmp_path
    )
    outcome = extraction.extract(job)
    record = extraction.make_record(job.clip, job.cache)
    data = bytearray(job.cache.read_bytes())
    data[len(data) // 2] ^= 1
    after = {"empty": b"", "cut": data[: len(data) // 2], "flipped": data}[damage]
    job.cache.write_bytes(after)
    assert extraction.extract(job) == outcome
    assert extraction.make_record(job.clip, job.cache)["frames"] == record["frames"]


def test_cache_of_earlier_versions_is_used_for_the_default_format_only(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    status, names = path.stat(), {}
    for format in (FrameFormat(32), FrameFormat(32, "squash"), FrameFormat(32, "crop", "bilinear")):
        job = extraction.make_job(Clip("a", ("x",), "train", 1.0), path, format, 2.0, tmp_path)
        names[format] = job.cache.stem
    key = repr((str(path), status.st_size, status.st_mtime_ns, 1.0, 3.0, 32))
    assert names[FrameFormat(32)] == hashlib.sha256(key.encode()).hexdigest()[:32]
    assert len(set(names.values())) == 3


@pytest.fixture
def broken(tmp_path):
    """Makes ten videos, one empty, one text, one truncated, and lists one that is missing."""
    folder = tmp_path / "videos"
    for number in range(7):
        make_video(folder / f"{number}.mkv", level=20 + 20 * number, seconds=1)
    cut_off(make_video(folder / "7.avi", seconds=20))
    (folder / "8.mkv").touch()
    (folder / "9.mkv").write_text("Not found\n" * 100)
    items = [{"video": str(n), "caption": f"video {n}"} for n in range(11)]
    return folder, annotate(tmp_path / "a.json", *items), tmp_path / "out"


def test_failures_are_listed_with_reasons(broken, in_thread, capsys):
    folder, annotations, output = broken
    prepare.prepare(annotations, folder, output, image_size=32, max_failures=0.3)
    out = capsys.readouterr().out
    assert (
        "8 of 11 clips read, 1 of them only in part; 3 failed "
        f"(listed in {output / 'failures.jsonl'})"
    ) in out.splitlines()
    listed = failures(output)
    assert [(entry["id"], entry["kept"]) for entry in listed] == [
        ("7", True),
        ("8", False),
        ("9", False),
        ("10", False),
    ]
    assert all(entry.keys() == {"id", "reason", "kept"} for entry in listed)
    reasons = [entry["reason"] for entry in listed]
    assert reasons[0].startswith("far fewer frames than the header states (")
    assert reasons[1] == "empty file (0 bytes)"
    assert reasons[2].startswith("cannot be opened: Invalid data")
    assert reasons[3] == "no video file found for '10'"
    kept = records(output)
    assert [record[0] for record in kept] == list("01234567")
    assert [levels(record[2]) for record in kept[:7]] == [[20 + 20 * n] for n in range(7)]
    assert 3 < len(kept[7][2]) < 20


@pytest.mark.parametrize(
    ("bound", "enough"), [(0.0, False), (0.27, False), (0.28, True), (1.0, True)]
)
def test_max_failures_is_enforced(broken, in_thread, bound, enough):
    folder, annotations, output = broken
    if enough:
        prepare.prepare(annotations, folder, output, image_size=32, max_failures=bound)
        assert len(Dataset(output).clips("train")) == 8
        return
    with pytest.raises(InputError) as error:
        prepare.prepare(annotations, folder, output, image_size=32, max_failures=bound)
    assert str(error.value) == (
        f"3 of 11 clips failed, more than --max_failures={bound:g} allows; the first is 8: "
        f"empty file (0 bytes); all failures are listed in {output / 'failures.jsonl'}"
    )
    assert len(failures(output)) == 4
    with pytest.raises(InputError, match="no prepared data set"):
        Dataset(output)


def report(tmp_path, failed, bound):
    listing = Listing(clips_by_id={str(number): Clip(str(number), ("x",)) for number in range(100)})
    outcomes = [extraction.Outcome("bad")] * failed + [extraction.Outcome()] * (100 - failed)
    extraction.report_failures(tmp_path, listing, outcomes, bound)


def test_max_failures_is_an_inclusive_fraction(tmp_path):
    for percent in range(100):
        report(tmp_path, percent, percent / 100)
        with pytest.raises(InputError, match=f"^{percent + 1} of 100 clips failed"):
            report(tmp_path, percent + 1, percent / 100)


def test_max_failures_applies_to_each_split(tmp_path):
    splits = ["train"] * 95 + ["test"] * 5
    clips = {str(n): Clip(str(n), ("x",), split) for n, split in enumerate(splits)}
    listing = Listing(clips_by_id=clips)
    outcomes = [extraction.Outcome()] * 95 + [extraction.Outcome("bad")] * 5
    with pytest.raises(InputError, match=r"^5 of 5 test clips failed, more than --max_failures"):
        extraction.report_failures(tmp_path, listing, outcomes, 0.05)
    extraction.report_failures(tmp_path, listing, outcomes, 1.0)


def test_other_videos_are_an_error_once_prepared(tmp_path, in_thread):
    folder, output = tmp_path / "videos", tmp_path / "out"
    make_video(folder / "a.mp4", seconds=1)
    annotations = annotate(tmp_path / "a.json", {"video": "a"}, {"video": "b"})
    prepare.prepare(annotations, folder, output, image_size=32, max_failures=0.5)
    make_video(folder / "b.mp4", seconds=1)
    with pytest.raises(InputError, match="prepared with other videos; choose another --output"):
        prepare.prepare(annotations, folder, output, image_size=32)


def test_partly_read_files_are_not_failures(tmp_path, in_thread, capsys):
    cut_off(make_video(tmp_path / "videos" / "a.avi", seconds=20))
    annotations, output = annotate(tmp_path / "a.json", {"video": "a"}), tmp_path / "out"
    prepare.prepare(annotations, tmp_path / "videos", output, image_size=32, max_failures=0.0)
    assert "1 of 1 clips read, 1 of them only in part (listed in " in capsys.readouterr().out
    assert [entry["kept"] for entry in failures(output)] == [True]
    assert len(records(output)) == 1


def test_repaired_videos_are_read_in_the_next_run(broken, in_thread, monkeypatch):
    folder, annotations, output = broken
    items = json.loads(annotations.read_text())
    with pytest.raises(InputError, match=r"^3 of 11 clips failed"):
        prepare.prepare(annotations, folder, output, image_size=32)
    read, read_frames = [], extraction.read_frames
    monkeypatch.setattr(
        extraction,
        "read_frames",
        lambda path, *a, **k: read.append(path.name) or read_frames(path, *a, **k),
    )
    make_video(folder / "8.mkv", level=180, seconds=1)
    (folder / "9.mkv").unlink()
    make_video(folder / "below" / "9.mp4", level=200, seconds=1)
    annotate(annotations, *items[:10])  # there is no video 10
    prepare.prepare(annotations, folder, output, image_size=32)
    assert sorted(read) == ["8.mkv", "9.mp4"]  # the others' frames are still there
    assert [levels(record[2]) for record in records(output)[8:]] == [[180], [200]]
    assert [entry["id"] for entry in failures(output)] == ["7"]


def test_a_changed_video_is_read_again(tmp_path, in_thread):
    folder, output = tmp_path / "videos", tmp_path / "out"
    make_video(folder / "a.mp4", level=40, seconds=1)
    annotations = annotate(tmp_path / "a.json", {"video": "a"}, {"video": "b"}, {"video": "c"})
    with pytest.raises(InputError, match=r"^2 of 3"):
        prepare.prepare(annotations, folder, output, image_size=32)
    for name, level in (("a.mp4", 100), ("b.mp4", 140), ("c.mp4", 180)):
        make_video(folder / name, level=level, seconds=1)
    prepare.prepare(annotations, folder, output, image_size=32)
    assert [levels(record[2]) for record in records(output)] == [[100], [140], [180]]


def extract_or_die(job):
    """Extracts frames in a worker process, which one video crashes."""
    if job.clip.video == "killer":
        time.sleep(0.2)  # so that others are at work as well
        os._exit(1)
    return REAL_EXTRACT(job)


def test_crashing_decoder_fails_only_its_clip(tmp_path, monkeypatch, capsys):
    folder, output = tmp_path / "videos", tmp_path / "out"
    names = ["0", "killer", "2", "3", "4"]
    for number, name in enumerate(names):
        make_video(folder / f"{name}.mp4", level=20 + 20 * number, seconds=1)
    monkeypatch.setattr(extraction, "extract", extract_or_die)
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 2)
    annotations = annotate(tmp_path / "a.json", *({"video": name} for name in names))
    prepare.prepare(annotations, folder, output, image_size=32, max_failures=0.2)
    assert "4 of 5 clips read; 1 failed" in capsys.readouterr().out
    reason = "the decoder crashed on this file"
    assert failures(output) == [{"id": "killer", "reason": reason, "kept": False}]
    found = [(record[0], levels(record[2])) for record in records(output)]
    assert found == [(names[n], [20 + 20 * n]) for n in (0, 2, 3, 4)]


def test_pool_that_breaks_on_submit_loses_no_job(tmp_path, monkeypatch):
    class Pool(concurrent.futures.Executor):
        """A pool that runs each job immediately and breaks at the fourth."""

        made = 0

        def __init__(self, *_args, **_options):
            Pool.made += 1
            self.count = 0

        def submit(self, function, *arguments):
            self.count += 1
            if self.count == 4 and Pool.made == 1:
                raise BrokenProcessPool
            future = concurrent.futures.Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(workers, "worker_pool", Pool)
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(extraction, "extract", lambda job: extraction.Outcome(note=job.clip.video))
    jobs = [extraction.ClipJob(Clip(f"job {n}", ("x",)), FrameFormat(32)) for n in range(9)]
    outcomes = extraction.extract_all(jobs, tmp_path, None)
    assert [outcome.note for outcome in outcomes] == [job.clip.video for job in jobs]


def test_only_corrupted_videos_is_a_one_line_error(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(bytes(range(256)) * 50)
    annotations, output = annotate(tmp_path / "a.json", {"video": "a"}), tmp_path / "out"
    done = run(tmp_path / "videos", annotations, output, "--max_failures=1")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        "error: 1 of 1 clips failed; the first is a: cannot be opened: Invalid data found .*; "
        f"all failures are listed in {output / 'failures.jsonl'}",
        last,
    )
    progress = [line for line in done.stderr.splitlines()[:-1] if line]
    assert all(line.startswith("reading videos:") for line in progress)
    with pytest.raises(InputError, match="no prepared data set"):
        Dataset(output)
