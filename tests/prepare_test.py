"""Tests of preparing: data sets that appear atomically, also after kills, and invalid input."""

import json
import signal
import subprocess
import time

import pytest
import tiny
from preparing import (
    ROOT,
    annotate,
    command,
    group_is_gone,
    in_thread,
    levels,
    main,
    make_wide_video,
    records,
    run,
    videos,
)

from xclip_jax import prepare
from xclip_jax.cli import InputError
from xclip_jax.data.builder import Dataset, dataset_folder
from xclip_jax.data.preprocess import FrameFormat, decode_jpeg
from xclip_jax.data.text import load_tokenizer

__all__ = ["in_thread", "videos"]  # the fixtures


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


def test_other_image_size_is_an_error(videos, tmp_path, in_thread):
    annotations = annotate(tmp_path / "a.json", {"video": "d"})
    prepare.prepare(annotations, videos, tmp_path / "out", image_size=32)
    with pytest.raises(InputError, match="prepared with other image_size; choose"):
        prepare.prepare(annotations, videos, tmp_path / "out", image_size=16)


def test_other_format_of_frames_is_an_error(videos, tmp_path, in_thread, capsys):
    annotations, output = annotate(tmp_path / "a.json", {"video": "d"}), tmp_path / "out"
    prepare.prepare(annotations, videos, output, image_size=32)
    with pytest.raises(InputError, match="prepared with other resize, interpolation; choose"):
        prepare.prepare(
            annotations, videos, output, image_size=32, resize="squash", interpolation="bilinear"
        )
    request = output / "request.json"  # earlier versions stored neither
    fields = json.loads(request.read_text())
    assert (fields.pop("resize"), fields.pop("interpolation")) == ("crop", "bicubic")
    request.write_text(json.dumps(fields))
    prepare.prepare(annotations, videos, output, image_size=32)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match="prepared with other resize; choose"):
        prepare.prepare(annotations, videos, output, image_size=32, resize="squash")


SQUASHED = ["--resize=squash", "--interpolation=bilinear"]


@pytest.fixture(scope="module")
def squashing_model(tmp_path_factory):
    preprocess = {"resize": "squash", "interpolation": "bilinear"}
    return tiny.make_model(tmp_path_factory.mktemp("model"), preprocess=preprocess)


def test_frames_are_made_as_the_options_or_the_model_say(
    squashing_model, tmp_path, in_thread, capsys
):
    wide = make_wide_video(tmp_path / "videos" / "wide.mp4")
    annotations = annotate(tmp_path / "a.json", {"video": "wide"})
    common = ["--dataset=captions", f"--videos={wide.parent}", f"--annotations={annotations}"]
    ways = {
        "default": ["--image_size=16"],
        "options": ["--image_size=16", *SQUASHED],
        "model": [f"--model={squashing_model}"],
    }
    for name, options in ways.items():
        prepare.main([*common, f"--output={tmp_path / name}", *options])
    assert f"frames of {squashing_model}: 16 px, squash, bilinear\n" in capsys.readouterr().out
    formats = {name: Dataset(tmp_path / name).format for name in ways}
    squash = FrameFormat(16, "squash", "bilinear")
    assert formats == {"default": FrameFormat(16), "options": squash, "model": squash}
    assert records(tmp_path / "model") == records(tmp_path / "options")
    # The white borders are cut off by the crop, and a quarter of the squashed frame each.
    columns = {}
    for name in ("default", "model"):
        frame = decode_jpeg(records(tmp_path / name)[0][2][0])
        columns[name] = (frame.mean((0, 2)) > 128).tolist()
    assert columns == {"default": [False] * 16, "model": [c < 4 or c >= 12 for c in range(16)]}


def test_rendered_data_has_the_format_of_the_options(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.rendered, "render_dataset", lambda *_, **__: None)
    calls = []
    monkeypatch.setattr(prepare, "prepare", lambda *_, **options: calls.append(options))
    prepare.main(["--dataset=rendered", f"--output={tmp_path}", "--image_size=48", *SQUASHED])
    format = {"image_size": 48, "resize": "squash", "interpolation": "bilinear", "spread": 0}
    assert calls == [format]


def test_model_excludes_the_options_that_it_sets(squashing_model, tmp_path, capsys):
    common = ["--dataset=captions", f"--videos={tmp_path}", f"--output={tmp_path / 'out'}"]
    common.append(f"--annotations={annotate(tmp_path / 'a.json', {'video': 'a'})}")
    message = f"--model={squashing_model} sets the frames: it excludes --image_size, --resize"
    both = ["--image_size=16", "--resize=crop"]
    assert main(capsys, *common, f"--model={squashing_model}", *both) == (1, f"error: {message}\n")
    missing = f"no model in {tmp_path}: model.json is missing"
    assert main(capsys, *common, f"--model={tmp_path}") == (1, f"error: {missing}\n")
    assert not (tmp_path / "out").exists()


def start(*arguments):
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_when(process, condition):
    """Kills only the main process, returns True if it was still running."""
    while not (hit := condition()) and process.poll() is None:
        time.sleep(0.0005)
    process.kill()
    return bool(hit) and process.wait() == -signal.SIGKILL


def test_killed_runs_resume_to_the_same_data_set(videos, tmp_path, in_thread, capsys):
    """Kills the command while it reads and twice while it writes."""
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


def test_run_killed_at_its_end_is_complete(videos, tmp_path, in_thread, capsys):
    annotations = annotate(tmp_path / "a.json", {"video": "d"})
    prepare.prepare(annotations, videos, tmp_path / "out", image_size=32)
    (tmp_path / "out" / "work" / "ab").mkdir(parents=True)
    prepare.prepare(annotations, videos, tmp_path / "out", image_size=32)
    assert "nothing to do" in capsys.readouterr().out
    assert not (tmp_path / "out" / "work").exists()


def test_one_file_with_two_names_is_an_error(videos, tmp_path):
    annotations = annotate(tmp_path / "a.json", {"video": "a"}, {"video": "a.mp4", "start": 1})
    message = (
        f"videos 'a' and 'a.mp4' are the same file {videos / 'a.mp4'}: use the same name for both"
    )
    with pytest.raises(InputError, match=f"^{message}$"):
        prepare.prepare(annotations, videos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
        ({"--split": "9k"}, "--split=9k: with --dataset=captions it must be omitted (no variants)"),
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
    flags = ("dataset", "videos", "annotations", "output", "max_failures")
    for flag in (*flags, "model", "image_size", "resize", "interpolation"):
        assert f"--{flag}" in out
