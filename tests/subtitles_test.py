"""Tests of reading subtitles beside and inside films."""

import os
import time
import unicodedata

import pytest
from subtitle_files import write_with_streams
from video_files import at_rate, write
from whisper_files import beeps, write_film

from xclip_jax.data.video import VideoError
from xclip_jax.search import subtitles
from xclip_jax.search.lines import MAX_CHARACTERS, Line
from xclip_jax.search.subtitles import (
    find_all_sidecars,
    find_sidecars,
    has_text_streams,
    read_subtitles,
)

SRT = """1
00:00:01,000 --> 00:00:02,500
Hello <i>there</i>,
old {\\an8}friend

2
00:00:04,000 --> 00:00:05,000
Second &amp; last
"""
VTT = """WEBVTT - a title

STYLE
::cue { color: red }

NOTE a comment

intro
00:01.000 --> 00:02.500 position:10%
<v Roger>Hello <c.loud>there</c>,
old <00:00:01.500>friend<00:00:02.000>

NOTE between

last one
00:00:04.000 --> 00:00:05.000
Second &amp; last
"""
ASS = """[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, PrimaryColour
Style: Broken,Arial,&HZZZ

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Comment: 0,0:00:00.00,0:00:09.00,Default,,0,0,0,,not shown
Dialogue: 0,0:00:01.00,0:00:02.50,Default,Roger,0,0,0,,{\\b1}Hello{\\b0} there,\\Nold\\hfriend
Dialogue: 0,0:00:03.00,0:00:04.00,Default,,0,0,0,,{\\p1}m 0 0 l 100 0 100 100{\\p0}
Dialogue: 0,0:00:04.00,0:00:05.00,Default,,0,0,0,,Second & last
"""
LINES = [Line(1, 2.5, "Hello there, old friend"), Line(4, 5, "Second & last")]
FILES = {".srt": SRT, ".vtt": VTT, ".ass": ASS, ".ssa": ASS.replace("e: 0,", "e: Marked=0,")}


@pytest.fixture
def film(tmp_path):
    return write(tmp_path / "film.mp4", at_rate(1, 10))


def touch(folder, *names):
    for name in names:
        (folder / name).write_text("")


def test_sidecars_have_the_name_of_the_film_and_its_language(tmp_path):
    own = ("film.srt", "film.EN.Srt", "film.pt-BR.forced.vtt", "film.ASS", "film.mp4.srt")
    touch(tmp_path, "film.mp4", "film.part.mkv", *own)
    touch(tmp_path, "film2.srt", "my film.srt", "film.part.srt", "film.part.en.srt")
    touch(tmp_path, "film.txt", "Film.srt", "film.a b.srt", "film.a.b.c.d.srt")
    assert find_sidecars(tmp_path / "film.mp4") == sorted(str(tmp_path / name) for name in own)
    parts = [str(tmp_path / name) for name in ("film.part.en.srt", "film.part.srt")]
    assert find_sidecars(tmp_path / "film.part.mkv") == parts


def test_sidecars_of_a_missing_folder_and_of_a_relative_path(tmp_path, monkeypatch):
    assert find_sidecars(tmp_path / "missing" / "film.mp4") == []
    touch(tmp_path, "a.srt")
    monkeypatch.chdir(tmp_path)
    assert find_sidecars("a.mp4") == [str(tmp_path / "a.srt")]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_sidecars_are_found_in_another_form_of_unicode(tmp_path, forms):
    film, sidecar = map(unicodedata.normalize, forms, ("\xe9t\xe9.mp4", "\xe9t\xe9.en.srt"))
    touch(tmp_path, film, sidecar, "ete.srt")
    assert find_sidecars(tmp_path / film) == [str(tmp_path / sidecar)]


def test_sidecars_of_many_films_are_those_of_each(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        touch(folder, "film.mp4", "film.avi", "film.part.mkv", "film.srt", "film.avi.srt")
        touch(folder, "film.en.srt", "film.part.srt", "film.mp4x.srt", "film.mp4-x.srt", "d.mp4")
    paths = [str(folder / name) for folder in folders for name in sorted(os.listdir(folder))]
    paths.append(str(tmp_path / "missing" / "film.mp4"))
    found = find_all_sidecars(paths)
    assert found == {path: find_sidecars(path) for path in paths}
    names = [os.path.basename(path) for path in found[str(folders[1] / "film.mp4")]]
    assert names == ["film.avi.srt", "film.en.srt", "film.srt"]
    assert found[str(folders[0] / "d.mp4")] == found[paths[-1]] == []


def test_sidecars_of_many_films_take_linear_time(tmp_path):
    names = [f"film {number}" for number in range(2000)]
    touch(tmp_path, *(name + suffix for name in names for suffix in (".mp4", ".srt")))
    start = time.perf_counter()
    found = find_all_sidecars(str(tmp_path / f"{name}.mp4") for name in names)
    assert time.perf_counter() - start < 1
    assert all(files == [path[:-4] + ".srt"] for path, files in found.items())


def test_known_sidecars_are_not_searched(film):
    film.with_suffix(".srt").write_text(SRT)
    assert read_subtitles(film, []) == ([], [])
    assert not has_text_streams(film)


@pytest.mark.parametrize("suffix", FILES)
def test_sidecar_of_each_format(film, suffix):
    film.with_suffix(suffix).write_text(FILES[suffix])
    assert read_subtitles(film) == (LINES, [])


@pytest.mark.parametrize("suffix", [".vtt", ".ass"])
def test_format_is_recognized_in_a_file_named_srt(film, suffix):
    film.with_suffix(".srt").write_text(FILES[suffix])
    assert read_subtitles(film) == (LINES, [])


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "latin-1"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings(film, encoding, newline):
    text = SRT.replace("Second &amp; last", "Ça va, Señor Müller?").replace("\n", newline)
    film.with_suffix(".srt").write_bytes(text.encode(encoding))
    lines, problems = read_subtitles(film)
    assert [line.text for line in lines] == ["Hello there, old friend", "Ça va, Señor Müller?"]
    assert problems == []


def test_bytes_that_are_undefined_in_windows_1252_are_read(film):
    film.with_suffix(".srt").write_bytes(SRT.encode().replace(b"Second", b"S\x81cond \xe9"))
    assert read_subtitles(film).lines[1].text.endswith("cond é & last")


def test_lines_without_length_last_until_the_next_one_of_their_source(tmp_path):
    streams = [
        ("subrip", [(1, 1, b"one"), (8, 8, b"last")]),
        ("subrip", [(2, 2, b"eins"), (4, 4, b"zwei")]),
    ]
    path = write_with_streams(tmp_path / "film.mkv", streams)
    path.with_suffix(".srt").write_text("00:00:01,500 --> 00:00:01,500\nuno\n")
    lines = [Line(1, 4, "one"), Line(1.5, 4.5, "uno"), Line(2, 4, "eins"), Line(4, 7, "zwei")]
    assert read_subtitles(path).lines == [*lines, Line(8, 11, "last")]


def test_line_before_the_first_frame_has_a_length(tmp_path):
    path = write_film(tmp_path / "film.mkv", beeps(8), codec="pcm_s16le", video_start=3.0)
    path.with_suffix(".srt").write_text(SRT)
    assert read_subtitles(path).lines == [Line(0, 1, LINES[0].text), Line(1, 2, LINES[1].text)]


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("subrip", ".mkv"), ("ass", ".mkv"), ("webvtt", ".mkv"), ("mov_text", ".mp4")],
)
def test_streams_inside_the_film(tmp_path, codec, suffix):
    cues = [(1, 2.5, b"Hello <i>there</i>,\nold friend"), (4, 5, b"Second & last")]
    path = write_with_streams(tmp_path / f"film{suffix}", [(codec, cues)])
    assert read_subtitles(path) == (LINES, [])


def test_languages_are_merged_by_time_and_identical_lines_occur_once(tmp_path):
    streams = [
        ("subrip", [(1, 2, b"one"), (5, 6, b"two")]),
        ("subrip", [(1, 2, b"one"), (3, 4, "größe".encode())]),
    ]
    path = write_with_streams(tmp_path / "film.mkv", streams)
    (tmp_path / "film.de.srt").write_text("00:00:05,000 --> 00:00:06,000\ntwo\n")
    (tmp_path / "film.fr.srt").write_text("00:00:02,000 --> 00:00:03,000\ndeux\n")
    texts = [line.text for line in read_subtitles(path).lines]
    assert texts == ["one", "deux", "größe", "two"]


def test_times_of_streams_count_from_the_first_frame(tmp_path):
    for start in (2.0, 1.7e9):  # of a recording, seconds since 1970
        cues = [(start + 1, start + 2, b"inside")]
        path = write_with_streams(tmp_path / "film.mkv", [("subrip", cues)], start=start)
        assert read_subtitles(path).lines == [Line(1, 2, "inside")]


def test_times_of_sidecars_count_from_the_start_of_the_sound(tmp_path):
    path = write_film(tmp_path / "film.mkv", beeps(8), codec="pcm_s16le", video_start=1.5)
    path.with_suffix(".srt").write_text(SRT)
    lines = [Line(0, 1, LINES[0].text), Line(2.5, 3.5, LINES[1].text)]
    assert read_subtitles(path).lines == lines


def test_playlist_is_refused(tmp_path):
    write(tmp_path / "other.mp4", at_rate(1, 10))
    (tmp_path / "film.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    with pytest.raises(VideoError, match="cannot be opened"):
        read_subtitles(tmp_path / "film.mp4")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("film.srt", b"", "no subtitles"),
        ("film.srt", b"just\ntext\n" * 9, "no subtitles"),
        ("film.srt", bytes(range(256)) * 99, "not a text file"),
        ("film.srt", os.urandom(5000), ""),
        (
            "film.ass",
            b"[Script Info]\n[Events]\nDialogue: 0,nan,inf,a,,0,0,0,,b\n",
            "lines with invalid times: 1",
        ),
        ("film.ass", b"Dialogue: 0\nDialogue: \nDialogue\n", "no subtitles"),
        ("film.vtt", b"WEBVTT\n\n99:99 --> later\na\n", "lines with invalid times: 1"),
    ],
)
def test_broken_sidecar_is_reported_and_others_are_read(film, name, content, problem):
    (film.parent / name).write_bytes(content)
    film.with_suffix(".de.srt").write_text(SRT)
    lines, problems = read_subtitles(film)
    assert set(LINES) <= set(lines)
    assert len(problems) == 1
    assert problems[0].startswith(f"{name}: ")
    assert problem in problems[0]


def test_invalid_lines_leave_the_others(film):
    extra = "00:00:07,000 --> 00:00:06,000\nends before it starts\n\n99:99:99,999 --> 1\nbad\n\n"
    extra += "00:00:08,000 --> 00:00:09,000\n\n\n3\n00:00:08,000 --> 00:00:09,000\n \n"
    film.with_suffix(".srt").write_text(extra + SRT)
    lines, problems = read_subtitles(film)
    assert lines == [*LINES, Line(7, 10, "ends before it starts")]
    assert problems == ["film.srt: lines with invalid times: 1"]


def test_folder_and_pipe_named_like_a_sidecar_are_reported(film):
    film.with_suffix(".srt").mkdir()
    os.mkfifo(film.with_suffix(".vtt"))
    lines, problems = read_subtitles(film)
    assert lines == []
    assert problems == ["film.srt: is a folder", "film.vtt: is not a regular file"]


def test_large_file_is_refused_and_long_text_is_cut(film):
    film.with_suffix(".srt").write_bytes(b"a" * (subtitles.MAX_BYTES + 1))
    cue = "00:00:01.000 --> 00:00:02.000\n"
    film.with_suffix(".vtt").write_text("WEBVTT\n\n" + cue + f"{'word ' * 1000}\n" * 1000)
    lines, problems = read_subtitles(film)
    assert problems == [f"film.srt: larger than {subtitles.MAX_BYTES:,} bytes"]
    assert [len(line.text) for line in lines] == [MAX_CHARACTERS - 1]  # ends with a space


def test_number_of_lines_is_limited(film, monkeypatch):
    monkeypatch.setattr(subtitles, "MAX_LINES", 50)
    cues = [f"00:00:{k // 10:02},{k % 10}00 --> 00:00:09,000\nnumber {k}\n\n" for k in range(80)]
    film.with_suffix(".srt").write_text("".join(cues[:40]))
    film.with_suffix(".en.srt").write_text("".join(cues[40:]))
    lines, problems = read_subtitles(film)
    assert len(lines) == 50
    assert problems == ["only the first 50 of 80 lines are used"]
    film.with_suffix(".srt").write_text("".join(cues))
    assert "film.srt: only its first 50 lines are read" in read_subtitles(film).problems


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("film.srt", "00:00:01,000 --> 00:00:02,000\n<a"),
        ("film.srt", "\n"),
        ("film.srt", "<a\n"),
        ("film.srt", "{\\p"),
        ("film.vtt", "&#1;" * 100),
        ("film.vtt", "-->"),
        ("film.vtt", "-->\n"),
        ("film.ass", "{\\p1"),
        ("film.ass", "\\N" * 100 + "{"),
        ("film.srt", "00:00:01,000 --> 00:00:02,000\na\n"),
    ],
)
def test_hostile_text_takes_little_time(film, monkeypatch, name, unit):
    monkeypatch.setattr(subtitles, "MAX_BYTES", 2**18)
    head = "Dialogue: 0,0:00:01.00,0:00:02.00,a,,0,0,0,," if name.endswith("ass") else ""
    head = head or "00:00:01.000 --> 00:00:02.000\na "
    text = head + unit * ((2**18 - 100) // len(unit))
    (film.parent / name).write_text(text)
    start = time.perf_counter()
    read_subtitles(film)
    assert time.perf_counter() - start < 5
