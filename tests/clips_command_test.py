"""Tests of `search clip` and `search query --save_clips`."""

import os
import re

import av
import clip_files
import pytest
import tiny

from xclip_jax.search import indexing
from xclip_jax.search.__main__ import main
from xclip_jax.search.clips import InputError, name_clip, parse_time, save_clips
from xclip_jax.search.results import Hit


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "film.mp4"
    return clip_files.write(path, clip_files.numbered(50))


def make_hit(rank, path, start, end):
    bounds = {"segment_start": 0, "segment_end": end, "duration": end}
    numbers = {"start": start, "end": end, "second": start, "score": 1.0}
    return Hit(rank=rank, id="0" * 16, path=str(path), **numbers, **bounds)


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code not in (None, 0)
    return str(stop.value.code) + capsys.readouterr().err


def test_clip_copies_or_encodes(film, tmp_path, capsys):
    output = tmp_path / "new" / "clip.mp4"
    main(["clip", str(film), "--start=0:00.5", "--end=1", "--output", str(output)])
    assert capsys.readouterr().out == f"{output}: 0.40 s to 1.00 s, copied\n"
    arguments = ["--start=0.48", "--end=1", "--output", str(output), "--reencode"]
    main(["clip", str(film), *arguments])
    assert capsys.readouterr().out == f"{output}: 0.48 s to 1.00 s, encoded (as asked)\n"
    assert clip_files.read_numbers(output)[0] == list(range(12, 25))
    assert os.listdir(tmp_path / "new") == ["clip.mp4"]


@pytest.mark.parametrize(
    ("start", "end", "output", "message"),
    [
        ("1", "0:01", "a.mp4", "end must be after start, and both at least 0"),
        ("1:70", "2:00", "a.mp4", "--start=1:70: must be seconds, m:ss or h:mm:ss"),
        ("0", "1", "a.txt", "--output=a.txt: must end in .mp4, .mkv, .webm, .mov"),
        ("7", "8", "a.mp4", "start 7 s: the film ends at 2 s"),
    ],
)
def test_invalid_clips_are_one_line_errors(film, capsys, start, end, output, message):
    arguments = [f"--start={start}", f"--end={end}", f"--output={output}"]
    text = error_of(capsys, "clip", str(film), *arguments)
    assert message in text
    assert "\n" not in text.strip()


def test_unreadable_videos_are_one_line_errors(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    arguments = ["--start=0", "--end=1", "--output=b.mp4"]
    assert "a.mp4: cannot be opened" in error_of(capsys, "clip", f"{tmp_path}/a.mp4", *arguments)
    assert "c.mp4: no such file" in error_of(capsys, "clip", f"{tmp_path}/c.mp4", *arguments)


def test_clip_has_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["clip", "--help"])
    assert stop.value.code == 0
    assert "--reencode" in capsys.readouterr().out


def test_query_saves_the_moment_of_each_result(tmp_path, capsys, monkeypatch):
    tiny.make_model(tmp_path / "model")
    tiny.make_videos(tmp_path / "videos", 3)
    monkeypatch.setattr(indexing, "run_jobs", tiny.run_jobs_here)
    monkeypatch.chdir(tmp_path)
    main(["index", "videos", "--model=model", "--index=index"])
    (tmp_path / "videos" / "clip1.mp4").unlink()
    main(["query", "a red dog", "--index=index", "--save_clips=moments"])
    output = capsys.readouterr()
    files = sorted(os.listdir("moments"))
    assert len(files) == 2
    for file in files:
        assert re.fullmatch(r"0\d clip[02] 0m0\ds-0m0\ds\.mp4", file)
        with av.open(f"moments/{file}") as container:
            assert container.duration > 0
    assert re.search(r"not written: 0\d clip1 .*clip1\.mp4: no such file", output.err)
    assert "clips: 2 in moments" in output.err


def test_results_that_fail_do_not_stop_the_others(film, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    hits = [make_hit(1, tmp_path / "bad.mp4", 0, 1), make_hit(2, film, 0.4, 1.2)]
    files, failed = save_clips(hits, tmp_path / "clips")
    assert files == [tmp_path / "clips" / "02 film 0m00s-0m02s.mp4"]
    assert list(failed) == ["01 bad 0m00s-0m01s.mp4"]
    assert os.listdir(tmp_path / "clips") == [files[0].name]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/films/a dog.mp4", "a dog 0m08s-0m16s.mp4"),
        ("../../etc/passwd", "passwd 0m08s-0m16s.mp4"),
        ("/films/..", "clip 0m08s-0m16s.mp4"),
        ('a\n"b"\\c:?\N{RIGHT-TO-LEFT OVERRIDE}.mkv', "a__b__c___ 0m08s-0m16s.mp4"),
        (os.fsdecode(b"\xff.mp4"), "_ 0m08s-0m16s.mp4"),
        ("é" * 200 + ".mp4", "é" * 60 + " 0m08s-0m16s.mp4"),
        ("", "clip 0m08s-0m16s.mp4"),
    ],
)
def test_names_of_clips_are_valid_everywhere(path, expected):
    assert name_clip(path, 8.2, 15.5) == expected


def test_names_of_clips_in_long_films_have_hours():
    assert name_clip("a.mp4", 3600, 7325, ".webm") == "a 1h00m00s-2h02m05s.webm"


def test_times_are_seconds_or_parts():
    texts = ["83", "83.5", "1:23", "1:02:03.5", "0:00:00", "90:00"]
    assert [parse_time("--start", text) for text in texts] == [83, 83.5, 83, 3723.5, 0, 5400]
    for text in ("", "-1", "1:60", "1:2:3:4", "1e3", "nan", "1:", "٣", "1 ", "9" * 400):
        with pytest.raises(InputError, match="must be seconds, m:ss or h:mm:ss"):
            parse_time("--start", text)
