"""Tests of what all commands share: paths, JSON files, errors of any length."""

import os
import subprocess
import sys

import pytest

from xclip_jax.cli import (
    MAX_MESSAGE,
    InputError,
    check_local,
    list_some,
    one_line_errors,
    read_json,
)
from xclip_jax.data.annotations import read_text
from xclip_jax.data.builder import Dataset
from xclip_jax.data.container import VideoError
from xclip_jax.data.preprocess import FrameFormat, read_image
from xclip_jax.data.video import read_frames, read_still


@pytest.mark.parametrize("path", ["s3://bucket/a", "gs://b", "s3:/bucket/a", "hdfs://x"])
def test_uri_is_no_folder(path):
    with pytest.raises(InputError, match=f"^--output={path}: must be a path of this machine"):
        check_local("--output", path)
    with pytest.raises(InputError, match="must be a path of this machine"):
        Dataset(path)


@pytest.mark.parametrize("path", ["data/demo", "/a/b:c", "C:/videos", "a b", "x://"[:1]])
def test_paths_are_folders(path):
    assert str(check_local("--output", path)) == path


def test_warnings_are_lines_without_a_logger():
    code = (
        "import logging, orbax.checkpoint; from xclip_jax.cli import run_command; "
        "run_command(lambda: logging.warning('a film is missing'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith("WARNING: a film is missing\n")
    assert "root" not in done.stderr


def test_path_must_be_utf8():
    with pytest.raises(InputError, match="must be a name in UTF-8"):
        check_local("--output", os.fsdecode(b"u\xff"))


def test_word_longer_than_a_message_is_cut(capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise InputError("--config.seed=" + "9" * 5000)
    assert str(stop.value).startswith("error: --config.seed=999")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not valid JSON"), (b"[" * 100_000, "is not valid JSON"), (b"\xff", "not valid")],
)
def test_invalid_json_is_an_error(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"a.json: .*{message}"):
        read_json(path)


def test_fifo_is_no_json_file(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(InputError, match="is not a regular file"):  # and does not hang
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("read", [read_text, read_frames, read_still, read_image])
def test_fifo_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "a.mp4")
    more = {read_frames: [FrameFormat(16)], read_still: [1.0]}.get(read, [])
    with pytest.raises((InputError, VideoError, ValueError), match="is not a regular file"):
        read(tmp_path / "a.mp4", *more)
    with pytest.raises((InputError, VideoError, ValueError), match="is a folder"):
        read(tmp_path, *more)


def test_error_is_one_line_of_bounded_length(capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise InputError("a\nb " + "long " * 10**6)
    assert str(stop.value).startswith("error: a b long")
    assert "\n" not in str(stop.value)
    assert len(str(stop.value)) <= MAX_MESSAGE + 11


def test_first_items_are_listed():
    assert list_some(["a", "b"]) == "a; b"
    assert list_some([str(n) for n in range(9)]) == "0; 1; 2; 3; 4; and 4 more"
