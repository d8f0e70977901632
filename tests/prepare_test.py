"""Tests of preparing: data sets appear atomically, with corrupted videos and after kills.

The videos made here are grey, 64 pixels wide, with a frame every half second. The brightness of
frame n is level + 4 n, which identifies a stored frame.
"""

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from xclip_jax import prepare, workers
from xclip_jax.cli import InputError
from xclip_jax.data import extraction
from xclip_jax.data.annotations import Clip, Listing
from xclip_jax.data.builder import Dataset, dataset_folder
from xclip_jax.data.text import load_tokenizer
from xclip_jax.data.video import decode_jpeg

ROOT = Path(__file__).resolve().parents[1]
REAL_EXTRACT = extraction.extract


def make_video(path, level=20, seconds=3.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"crf": "4", "g": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(int(2 * seconds)):
            picture = np.full((64, 64, 3), level + 4 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 2)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut_off(path):
    """Truncates an AVI file: it opens, but has fewer frames than its header states."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 8 // 10])  # the header alone is 6 tenths


def annotate(path, *items):
    path.write_text(json.dumps([{"caption": "a grey picture"} | item for item in items]))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    make_video(folder / "a.mp4", level=20)
    make_video(folder / "sub" / "b.c.mkv", level=60, seconds=4)
    make_video(folder / "d.mp4", level=120, seconds=1)
    return folder


@pytest.fixture
def in_threads(monkeypatch):
    """Replaces the pool of processes by one of threads, which start faster."""
    monkeypatch.setattr(workers, "worker_pool", concurrent.futures.ThreadPoolExecutor)


def command(videos, annotations, output, *more):
    return [
        *(sys.executable, "-m", "xclip_jax.prepare", "--dataset=captions", f"--videos={videos}"),
        *(f"--annotations={annotations}", f"--output={output}", "--image_size=32", *more),
    ]


def run(*arguments):
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False
    )


def main(capsys, *arguments):
    """Runs the command line in this process; returns its exit status and stderr."""
    with pytest.raises(SystemExit) as stopped:
        prepare.main([str(argument) for argument in arguments])
    message = stopped.value.code
    if isinstance(message, str):  # as the interpreter does it
        print(message, file=sys.stderr)
        message = 1
    return message, capsys.readouterr().err


def records(output, split="train"):
    """Returns the content of a split."""
    return [
        (
            record["id"].decode(),
            [caption.decode() for caption in record["captions"]],
            list(record["frames"]),
            [float(time) for time in record["times"]],
        )
        for record in Dataset(output).clips(split)
    ]


def levels(frames):
    return [round(float(decode_jpeg(jpeg).mean()) / 4) * 4 for jpeg in frames]


def failures(output):
    return [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]


def snapshot(folder):
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


ITEMS = [
    {"video": "a", "captions": ["one", "two"]},
    {"video": "b.c", "caption": "a part", "start": 0.5, "end": 2.5, "split": "test"},
    {"video": "d.mp4", "caption": "ein größer Hund 犬", "split": "val"},
    {"video": "a", "caption": "the end", "start": 1.5},
    {"video": "a", "caption": "three"},
]


def write_items(path, items):
    path.write_text(json.dumps(items))
    return path


def test_complete_run_is_not_repeated(videos, tmp_path, capsys):
    annotations, output = write_items(tmp_path / "a.json", ITEMS), tmp_path / "out"
    done = run(videos, annotations, output)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "4 of 4 clips read",
        "writing train: 2 of 2 clips, val: 1 of 1 clips, test: 1 of 1 clips",
        f"prepared {output}",
    ]
    assert "4/4" in done.stderr
    assert "Traceback" not in done.stderr
    dataset = Dataset(output)
    assert dataset.image_size == 32
    assert {k: list(v) for k, v in dataset.captions_per_clip.items()} == {
        "train": [3, 1],
        "val": [1],
        "test": [1],
    }
    found = {split: records(output, split) for split in ("train", "val", "test")}
    expected = {
        "train": [
            ("a", ["one", "two", "three"], [20, 28, 36], [0, 1, 2]),
            ("a[1.5-]", ["the end"], [32, 40], [1.5, 2.5]),
        ],
        "val": [("d.mp4", ["ein größer Hund 犬"], [120], [0])],
        "test": [("b.c[0.5-2.5]", ["a part"], [64, 72, 80], [0.5, 1.5, 2.5])],
    }
    for split, clips in found.items():
        assert [(i, c, levels(f), t) for i, c, f, t in clips] == expected[split]
        assert all(decode_jpeg(jpeg).shape == (32, 32, 3) for clip in clips for jpeg in clip[2])
    assert (output / "failures.jsonl").read_text() == ""
    tokenizer = load_tokenizer(output / "tokenizer")
    assert tokenizer.encode("one")
    names = {path.name for path in output.iterdir()}
    assert names == {"failures.jsonl", "findings.jsonl", "request.json", "tokenizer", "xclip_clips"}

    before = snapshot(output)
    prepare.main(command(videos, annotations, output)[3:])
    assert capsys.readouterr() == (f"{output} is already prepared; nothing to do\n", "")
    assert snapshot(output) == before

    write_items(annotations, ITEMS[:2])
    assert main(capsys, *command(videos, annotations, output)[3:]) == (
        1,
        f"error: {output} holds a data set prepared with other annotations, videos; "
        "choose another --output or delete it\n",
    )
    assert snapshot(output) == before


def test_other_image_size_is_an_error(videos, tmp_path, in_threads):
    annotations = annotate(tmp_path / "a.json", {"video": "d"})
    prepare.prepare(annotations, videos, tmp_path / "out", image_size=32)
    with pytest.raises(InputError, match="prepared with other image_size; choose"):
        prepare.prepare(annotations, videos, tmp_path / "out", image_size=16)


def start(*arguments):
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_when(process, condition):
    """Kills only the main process; returns True if it was still running."""
    while not (hit := condition()) and process.poll() is None:
        time.sleep(0.0005)
    process.kill()
    return bool(hit) and process.wait() == -signal.SIGKILL


def group_is_gone(group, seconds=20):
    for _ in range(10 * seconds):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_killed_runs_resume_to_the_same_data_set(videos, tmp_path, in_threads, capsys):
    """Killed while reading and twice while writing."""
    segments = [
        {"video": "a", "caption": f"cut number {n}", "start": n / 1000, "split": split}
        for split in ("train", "test")
        for n in range(0 if split == "train" else 1, 300, 2)
    ]
    segments.insert(1, {"video": "missing", "caption": "nothing"})
    annotations = annotate(tmp_path / "a.json", *segments)
    output, work = tmp_path / "out", tmp_path / "out" / "work"
    arguments = (videos, annotations, output, "--max_failures=0.01")

    process = start(*arguments)
    assert kill_when(process, lambda: len(list(work.glob("*/*.npz"))) >= 20)
    assert group_is_gone(process.pid)  # no worker survives
    cached = {path: path.stat().st_mtime_ns for path in work.glob("*/*.npz")}
    assert 20 <= len(cached) < 300
    with pytest.raises(InputError, match="no prepared data set"):
        Dataset(output)

    builder = dataset_folder(output).parent
    for _ in range(2):
        process = start(*arguments)
        assert kill_when(process, lambda: any(builder.glob("incomplete.*/*")))
        assert group_is_gone(process.pid)
        assert any(builder.glob("incomplete.*"))
        with pytest.raises(InputError, match="no prepared data set"):
            Dataset(output)
        assert {path: path.stat().st_mtime_ns for path in cached} == cached  # not read again

    prepare.main(command(*arguments)[3:])
    assert "300 of 301 clips read; 1 failed" in capsys.readouterr().out
    whole = tmp_path / "whole"
    prepare.main(command(videos, annotations, whole, "--max_failures=0.01")[3:])
    for split in ("train", "test"):
        assert records(output, split) == records(whole, split)
        assert len(records(output, split)) == 150
    assert Dataset(output).fingerprint == Dataset(whole).fingerprint
    for name in ("failures.jsonl", "request.json", "tokenizer/tokenizer.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    files = [
        sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) for folder in (output, whole)
    ]
    assert files[0] == files[1]


def test_run_killed_at_its_end_is_complete(videos, tmp_path, in_threads, capsys):
    annotations = annotate(tmp_path / "a.json", {"video": "d"})
    prepare.prepare(annotations, videos, tmp_path / "out", image_size=32)
    (tmp_path / "out" / "work" / "ab").mkdir(parents=True)
    prepare.prepare(annotations, videos, tmp_path / "out", image_size=32)
    assert "nothing to do" in capsys.readouterr().out
    assert not (tmp_path / "out" / "work").exists()


@pytest.fixture
def broken(tmp_path):
    """Ten videos: one empty, one text, one truncated, and one more that is missing."""
    folder = tmp_path / "videos"
    for number in range(7):
        make_video(folder / f"{number}.mkv", level=20 + 20 * number, seconds=1)
    cut_off(make_video(folder / "7.avi", seconds=20))
    (folder / "8.mkv").touch()
    (folder / "9.mkv").write_text("Not found\n" * 100)
    items = [{"video": str(n), "caption": f"video {n}"} for n in range(11)]
    return folder, annotate(tmp_path / "a.json", *items), tmp_path / "out"


def test_failures_are_listed_with_reasons(broken, in_threads, capsys):
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
def test_max_failures_is_enforced(broken, in_threads, bound, enough):
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


def test_other_videos_are_an_error_once_prepared(videos, tmp_path, in_threads):
    folder, output = tmp_path / "videos", tmp_path / "out"
    make_video(folder / "a.mp4", seconds=1)
    annotations = annotate(tmp_path / "a.json", {"video": "a"}, {"video": "b"})
    prepare.prepare(annotations, folder, output, image_size=32, max_failures=0.5)
    make_video(folder / "b.mp4", seconds=1)
    with pytest.raises(InputError, match="prepared with other videos; choose another --output"):
        prepare.prepare(annotations, folder, output, image_size=32)


def test_partly_read_files_are_not_failures(tmp_path, in_threads, capsys):
    cut_off(make_video(tmp_path / "videos" / "a.avi", seconds=20))
    annotations, output = annotate(tmp_path / "a.json", {"video": "a"}), tmp_path / "out"
    prepare.prepare(annotations, tmp_path / "videos", output, image_size=32, max_failures=0.0)
    assert "1 of 1 clips read, 1 of them only in part (listed in " in capsys.readouterr().out
    assert [entry["kept"] for entry in failures(output)] == [True]
    assert len(records(output)) == 1


def test_repaired_videos_are_read_in_the_next_run(broken, in_threads, monkeypatch):
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


def test_a_changed_video_is_read_again(videos, tmp_path, in_threads):
    folder, output = tmp_path / "videos", tmp_path / "out"
    make_video(folder / "a.mp4", level=40, seconds=1)
    annotations = annotate(tmp_path / "a.json", {"video": "a"}, {"video": "b"}, {"video": "c"})
    with pytest.raises(InputError, match=r"^2 of 3"):
        prepare.prepare(annotations, folder, output, image_size=32)
    for name, level in (("a.mp4", 100), ("b.mp4", 140), ("c.mp4", 180)):
        make_video(folder / name, level=level, seconds=1)
    prepare.prepare(annotations, folder, output, image_size=32)
    assert [levels(record[2]) for record in records(output)] == [[100], [140], [180]]


def test_one_file_with_two_names_is_an_error(videos, tmp_path):
    annotations = annotate(tmp_path / "a.json", {"video": "a"}, {"video": "a.mp4", "start": 1})
    message = (
        f"videos 'a' and 'a.mp4' are the same file {videos / 'a.mp4'}: use the same name for both"
    )
    with pytest.raises(InputError, match=f"^{message}$"):
        prepare.prepare(annotations, videos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def extract_or_die(job):
    """Runs in a worker process, which one video crashes."""
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
        """Runs each job immediately and breaks at the fourth."""

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
    jobs = [extraction.ClipJob(Clip(f"job {n}", ("x",)), image_size=32) for n in range(9)]
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


def test_invalid_input_is_a_one_line_error(videos, tmp_path, capsys):
    annotations = annotate(tmp_path / "a.json", {"video": "a"})
    (tmp_path / "empty.csv").touch()
    (tmp_path / "file").touch()
    good = {
        "--dataset": "captions",
        "--videos": videos,
        "--annotations": annotations,
        "--output": tmp_path / "out",
    }
    cases = [
        ({"--videos": tmp_path / "x"}, f"no such folder of videos: {tmp_path / 'x'}"),
        ({"--videos": tmp_path / "file"}, f"no such folder of videos: {tmp_path / 'file'}"),
        (
            {"--annotations": tmp_path / "empty.csv"},
            f"{tmp_path / 'empty.csv'}: contains no captions",
        ),
        (
            {"--annotations": tmp_path / "x.csv"},
            f"[Errno 2] No such file or directory: '{tmp_path / 'x.csv'}'",
        ),
        (
            {"--annotations": tmp_path},
            f"{tmp_path} is a folder; --annotations must be the captions file itself",
        ),
        ({"--annotations": None}, "--annotations is required with --dataset=captions"),
        ({"--videos": None}, "--videos is required with --dataset=captions"),
        (
            {"--output": tmp_path / "file" / "out"},
            f"[Errno 20] Not a directory: '{tmp_path / 'file' / 'out' / 'work'}'",
        ),
        (
            {"--output": tmp_path / "file"},
            f"[Errno 20] Not a directory: '{tmp_path / 'file' / 'work'}'",
        ),
        (
            {"--split": "9k"},
            "--split=9k: with --dataset=captions it must be omitted: it has no variants",
        ),
        ({"--beam_options": "--a=b"}, "--beam_options requires --beam_runner"),
        ({"--dataset": "rendered"}, "--videos is not allowed with --dataset=rendered"),
        ({"--max_seconds": "-1"}, "--max_seconds=-1: must be at least 0"),
        ({"--max_failures": "1.5"}, "--max_failures=1.5: must be from 0 to 1"),
        ({"--max_failures": "nan"}, "--max_failures=nan: must be from 0 to 1"),
        ({"--image_size": "0"}, "--image_size=0: must be from 1 to 4096"),
    ]
    for change, message in cases:
        arguments = [f"{k}={v}" for k, v in (good | change).items() if v is not None]
        assert main(capsys, *arguments) == (1, f"error: {message}\n")
    assert not (tmp_path / "out").exists()


def test_unknown_values_and_missing_flags_are_usage_errors(capsys):
    status, err = main(capsys, "--dataset=imagenet", "--output=x")
    assert status == 2
    assert "invalid choice: 'imagenet'" in err
    status, err = main(capsys, "--dataset=captions")
    assert status == 2
    assert "--output" in err


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        prepare.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for flag in ("dataset", "videos", "annotations", "output", "image_size", "max_failures"):
        assert f"--{flag}" in out
