"""Tests of the reader of user captions and of the lookup of video files."""

import json
import re

import pytest

from xclip_jax.cli import InputError
from xclip_jax.data.annotations import Clip, read_captions
from xclip_jax.data.extraction import VideoFolder


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_captions(path).clips


CLIPS = [
    Clip("z/a.b.mp4", ("a dog, a cat", 'he says "hi"')),
    Clip("é", ("ein größer Hund 犬",), "test", 1.5, 3.0),
    Clip("é", ("later",), "train", 3.0, None),
    Clip("é", ("the whole",), "val"),
    Clip("é", ("to here",), "train", None, 3.0),
]
ITEMS = [
    {"video": "z/a.b.mp4", "caption": "a dog, a cat"},
    {
        "video": "é",
        "captions": ["ein größer \n Hund  犬 "],
        "start": 1.5,
        "end": 3,
        "split": "test",
    },
    {"video": "é", "caption": "later", "start": "3"},
    {"video": "é", "caption": "the whole", "split": "val"},
    {"video": "z/a.b.mp4", "captions": ['he says "hi"'], "split": "train"},
    {"video": "é", "caption": "to here", "start": None, "end": 3.0},
]
CSV = '''video,start,end,split,caption
z/a.b.mp4,,,,"a dog, a cat"
é,1.5,3,test,"ein größer
 Hund  犬 "

é,3,,,later
é,,,val,the whole
z/a.b.mp4,,,train,"he says ""hi"""
é,,3.0,,to here
'''
JSONL = "".join(json.dumps(item, ensure_ascii=False) + "\n\n" for item in ITEMS)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ITEMS)),
        ("a.JSON", json.dumps(ITEMS, ensure_ascii=False, indent=1)),
        ("a.jsonl", JSONL),
        ("a.csv", CSV),
    ],
)
def test_all_formats_give_the_same_clips(tmp_path, name, text, newline, bom):
    assert read(tmp_path, name, bom + text.replace("\n", newline)) == CLIPS


def test_last_line_needs_no_line_end(tmp_path):
    assert read(tmp_path, "a.csv", "video,caption\na,b") == [Clip("a", ("b",))]
    assert read(tmp_path, "a.jsonl", '{"video": "a", "caption": "b"}') == [Clip("a", ("b",))]


def test_ids_are_unique_and_include_the_segment(tmp_path):
    assert [clip.id for clip in CLIPS] == ["z/a.b.mp4", "é[1.5-3]", "é[3-]", "é", "é[0-3]"]
    assert Clip("a", (), start=0.0).id == "a"  # all of it, as without a start
    assert Clip("a", (), start=1000000.0).id == "a[1000000-]"
    rows = "".join(f"a,cut {n},{3600 + n / 1000},{3700}\n" for n in range(20))
    clips = read(tmp_path, "a.csv", "video,caption,start,end\n" + rows)
    assert len({clip.id for clip in clips}) == len(clips) == 20


def item(**fields):
    return json.dumps([{"video": "a", "caption": "b"}, {"video": "a", "caption": "b"} | fields])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", ": contains no captions"),
        ("a.csv", "video,caption\n", ": contains no captions"),
        ("a.csv", "\n\n", ": contains no captions"),
        ("a.csv", "video,text\na,b\n", ", line 1: field 'text': unknown; must be one of vid"),
        ("a.csv", "caption,split\nb,train\n", ", line 2: field 'video': missing"),
        ("a.csv", "video,split\na,train\n", ", line 2: field 'caption': missing"),
        ("a.csv", "video;caption\na;b\n", ", line 1: field 'video;caption': unknown"),
        ("a.csv", "video,caption,caption\na,b,c\n", ", line 1: field 'caption' occurs 2 times"),
        ("a.csv", "video,caption\na,b\na\n", ", line 3: 1 values for the 2 fields video,caption"),
        (
            "a.csv",
            "video,caption\na,b\nc,d, e\n",
            ", line 3: 3 values for the 2 fields video,caption",
        ),
        ("a.csv", 'video,caption\na,b\nc,"d" e\n', ", line 3: invalid CSV: "),
        ("a.csv", 'video,caption\na,b\nc,"d\n', ", line 3: invalid CSV: unexpected end of data"),
        ("a.csv", 'video,caption\nc,"d\n' + "a,b\n" * 9, ", line 2: invalid CSV: unexpected en"),
        ("a.csv", "\nvideo,caption\n\n\na,b\n\n,c\n", ", line 7: field 'video': missing"),
        ("a.csv", "video,caption\na,\n", ", line 2: field 'caption': contains an empty sentence"),
        ("a.csv", "video,caption\na,&nbsp;\n", ", line 2: field 'caption': contains an empty sent"),
        ("a.csv", "video,caption\na,\u200b\n", ", line 2: field 'caption': contains an empty sent"),
        ("a.csv", "video,caption\na,b\n ,c\n", ", line 3: field 'video': missing"),
        ("a.csv", "video,caption,captions\na,b,c\n", ", line 2: field 'captions': there is a 'cap"),
        (
            "a.csv",
            "video,caption,start\na,b,soon\n",
            ", line 2: field 'start': 'soon' must be a nu",
        ),
        ("a.csv", 'video,caption\na,"b\nc"\nd,"e\nf"\n,g\n', ", line 6: field 'video': missing"),
        ("a.csv", "video,caption\na,b\n".encode("utf-16"), ", line 1: not UTF-8 text"),
        ("a.csv", "video,caption\na,b\nb,é\n".encode("cp1252"), ", line 3: not UTF-8 text"),
        ("a.jsonl", b"\n\n\xe9", ", line 3: not UTF-8 text"),
        ("a.json", b"[\n\xff]", ", line 2: not UTF-8 text"),
        ("a.json", "", ", line 1: invalid JSON: Expecting value"),
        ("a.json", "[]", ": contains no captions"),
        ("a.json", '[\n{"video": "a",\n}]', ", line 3: invalid JSON: "),
        ("a.json", '{"video": "a", "caption": "b"}', ": must be a list of objects"),
        ("a.json", '["a"]', ", item 1: must be an object"),
        ("a.jsonl", "", ": contains no captions"),
        ("a.jsonl", '{"video": "a", "caption": "b"}\n{"video"\n', ", line 2: invalid JSON: Ex"),
        ("a.jsonl", "\n[]\n", ", line 2: must be an object"),
        ("a.json", item(ends=1), ", item 2: field 'ends': unknown; must be one of vid"),
        ("a.json", item(video=1), ", item 2: field 'video': missing or not a file name"),
        ("a.json", item(caption=" \n"), ", item 2: field 'caption': contains an empty sentence"),
        (
            "a.json",
            item(caption="half \ud83d"),
            ", item 2: field 'caption': contains an empty senten",
        ),
        ("a.json", item(caption=None), ", item 2: field 'caption': missing or not a sentence"),
        ("a.json", item(captions=["x"]), ", item 2: field 'captions': there is a 'caption' as we"),
        ("a.json", item(start="x"), ", item 2: field 'start': 'x' must be a number of seconds"),
        ("a.json", item(start=[1]), ", item 2: field 'start': [1] must be a number of seconds"),
        ("a.json", item(start=True), ", item 2: field 'start': True must be a number of seconds"),
        ("a.json", item(start=10**400), ", item 2: field 'start': 1000000"),
        ("a.json", item(start=-1), ", item 2: field 'start': -1 must be a number of seconds"),
        ("a.json", item(start=float("nan")), ", item 2: field 'start': nan must be a number of s"),
        ("a.json", item(end="inf"), ", item 2: field 'end': 'inf' must be a number of seconds"),
        ("a.json", item(start=2, end=2), ", item 2: field 'end': 2 s is not after the start at 2"),
        ("a.json", item(end=0), ", item 2: field 'end': 0 s is not after the start at 0 s"),
        ("a.json", item(split="dev"), ", item 2: field 'split': 'dev' must be one of train"),
        ("a.json", item(split=["val"]), ", item 2: field 'split': ['val'] must be one of train"),
        ("a.json", item(split="test"), ", item 2: field 'split': a is in test and train"),
        ("a.json", '[{"video": "a", "captions": []}]', ", item 1: field 'captions': missing or n"),
        (
            "a.json",
            '[{"video": "a", "captions": ["b", 1]}]',
            ", item 1: field 'captions': contains",
        ),
        ("a.tsv", "video\tcaption\n", ": captions must be a .json, .jsonl, .csv file"),
        ("a", "", ": captions must be a .json, .jsonl, .csv file"),
    ],
)
def test_invalid_captions_are_one_line_errors(tmp_path, name, content, message):
    with pytest.raises(InputError) as error:
        read(tmp_path, name, content)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / name}{message}")
    assert "\n" not in text


def test_folder_or_missing_file_is_an_error(tmp_path):
    (tmp_path / "a.json").mkdir()
    for folder in (tmp_path, tmp_path / "a.json"):
        with pytest.raises(InputError, match=rf"^{re.escape(str(folder))} is a folder; "):
            read_captions(folder)
    with pytest.raises(OSError, match=r"No such file or directory: .*b\.json"):
        read_captions(tmp_path / "b.json")


FILES = ("a.mp4", "a.webm", "b.MOV", "c.1.mkv", "x/d.avi", "x/e.mp4", "y/e.mp4", "y/a.mp4", "f.txt")


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "g.mp4").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("video", "file"),
    [
        ("a.mp4", "a.mp4"),  # although a.webm has the same stem and y/a.mp4 the same name
        ("a.webm", "a.webm"),
        ("y/a.mp4", "y/a.mp4"),
        ("y/a", "y/a.mp4"),
        ("b", "b.MOV"),
        ("b.MOV", "b.MOV"),
        ("c.1", "c.1.mkv"),
        ("c.1.mkv", "c.1.mkv"),
        ("c", None),  # only the last suffix may be omitted
        ("d", "x/d.avi"),
        ("d.avi", "x/d.avi"),
        ("x/d", "x/d.avi"),
        ("x/e.mp4", "x/e.mp4"),
        ("y/e", "y/e.mp4"),
        ("y/d", None),
        ("f", None),  # not a video: needs its full name
        ("f.txt", "f.txt"),
        ("g", None),
        ("h", None),
    ],
)
def test_videos_are_located_by_name_path_or_stem(folder, video, file):
    assert VideoFolder(folder).locate(video, is_path=True) == (file and folder / file)


@pytest.mark.parametrize(
    ("video", "files"),
    [("a", ("a.mp4", "a.webm", "y/a.mp4")), *((v, ("x/e.mp4", "y/e.mp4")) for v in ("e", "e.mp4"))],
)
def test_ambiguous_name_is_an_error_that_lists_the_files(folder, video, files):
    with pytest.raises(InputError) as error:
        VideoFolder(folder).locate(video, is_path=True)
    named = " and ".join(str(folder / file) for file in files)
    assert str(error.value) == f"video {video!r} is ambiguous: {named}"


def test_full_path_takes_precedence_over_a_name(tmp_path):
    for name in ("x/a.mp4", "x/a.mp4.webm", "a.mp4.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = VideoFolder(tmp_path)
    assert folder.locate("x/a.mp4", is_path=True) == tmp_path / "x/a.mp4"
    with pytest.raises(InputError, match="ambiguous"):
        folder.locate(
            "a.mp4", is_path=True
        )  # a.mp4.mkv without its suffix, or the name of a file elsewhere


def test_missing_folder_or_no_video_is_an_error(tmp_path):
    with pytest.raises(InputError, match=f"^no such folder of videos: {tmp_path / 'x'}$"):
        VideoFolder(tmp_path / "x")
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=f"^no video files in {tmp_path}$"):
        VideoFolder(tmp_path)
    with pytest.raises(InputError, match=r"^no such folder of videos: .*txt$"):
        VideoFolder(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("file", "video"),
    [
        ("12@N00_34_ab.mp4", "12@N00_34_ab.mp4"),
        ("12@N00_34_ab.mp4", "12@N00_34_ab.mov"),  # transcoded
        ("12@N00_34_ab.mov.mp4", "12@N00_34_ab.mov"),
        ("12@N00_34_ab.mp4.mp4", "12@N00_34_ab.mp4"),
        ("12@N00_34_ab.mov.mp4", "12@N00_34_ab.avi"),
        ("12@N00_34_ab.", "12@N00_34_ab."),
        ("12@N00_34_ab..mp4", "12@N00_34_ab."),
        ("12@N00_34_ab.webm", "12@N00_34_ab."),
        ("12@N00_34_ab.3GP", "12@N00_34_ab.3gp"),
        ("v_-x_.webm", "v_-x_"),
        ("0001_Film_00.01.03.250-00.01.06.375.avi", "0001_Film_00.01.03.250-00.01.06.375"),
    ],
)
@pytest.mark.parametrize("below", ["", "film.one/"])
def test_benchmark_ids_are_found_with_any_extension(tmp_path, file, video, below):
    (tmp_path / below).mkdir(exist_ok=True)
    for name in (file, "other.mp4", "0001_Film_00.01.03.250-00.01.06.avi"):
        (tmp_path / f"{below}{name}").touch()
    assert VideoFolder(tmp_path).locate(video) == tmp_path / f"{below}{file}"


def test_two_files_for_one_id_are_an_error_that_names_them(tmp_path):
    for name in ("a/12_ab.mp4", "b/12_ab.mov"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(
        InputError, match=r"'12_ab\.' is ambiguous: .*a/12_ab.mp4 and .*b/12_ab.mov"
    ):
        VideoFolder(tmp_path).locate("12_ab.")


def test_files_of_one_id_in_any_folder_are_an_error(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("a.mp4", "below/a.mp4", "b.mp4", "b.mp4.mp4", "c.mov", "c.mp4", "d.null"):
        (tmp_path / name).touch()
    videos = VideoFolder(tmp_path)
    for video in ("a.mp4", "a", "b.mp4", "b", "c.mov", "c.mp4", "c."):
        with pytest.raises(InputError, match="is ambiguous"):
            videos.locate(video)
    assert videos.locate("a.mp4", is_path=True) == tmp_path / "a.mp4"  # of one's own captions
    assert videos.locate("d.null") == tmp_path / "d.null"  # an id of DiDeMo's
    assert tmp_path / "d.null" not in videos.files


def test_links_are_followed_once(tmp_path):
    (tmp_path / "disk" / "film").mkdir(parents=True)
    (tmp_path / "disk" / "film" / "a.mp4").touch()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "films").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "film" / "loop").symlink_to(tmp_path / "videos")
    assert VideoFolder(tmp_path / "videos").locate("a") == tmp_path / "videos/films/film/a.mp4"
