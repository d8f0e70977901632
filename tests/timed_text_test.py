"""Tests of what is said and written in an index: subtitles, screen, speech, fusion, updates."""

import functools
import json
import shutil
import threading

import lancedb
import numpy as np
import pytest
from index_adding import run_together
from indexes import index, made, model, no_processes, videos
from PIL import Image, ImageDraw, ImageFont
from subtitle_files import write_with_streams
from video_files import at_rate, write

from xclip_jax.cli import InputError
from xclip_jax.data.container import AccessError
from xclip_jax.search import Index, passages, querying, timed_text
from xclip_jax.search.__main__ import main
from xclip_jax.search.lines import Line
from xclip_jax.search.passages import Found, Passages, match_lines
from xclip_jax.search.store import Store, retry_commit

__all__ = ["index", "made", "model", "no_processes", "videos"]  # the fixtures

SUBTITLES = """1
00:00:00,500 --> 00:00:01,500
The quarterly interest rates

2
00:00:02,200 --> 00:00:03,800
rise again, to be or not to be.

3
00:00:04,500 --> 00:00:05,500
A carpenter's hammers

"""


@pytest.fixture
def films(videos, tmp_path):
    """Copies two videos, the first with subtitles."""
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("clip0.mp4", "clip1.mp4"):
        shutil.copy2(videos / name, folder / name)
    (folder / "clip0.srt").write_text(SUBTITLES)
    return folder


@pytest.fixture
def said(films, model, tmp_path):
    """Makes an index of the two videos, in segments of two seconds."""
    index = Index.create(tmp_path / "said", model, segment_seconds=2)
    index.add(films)
    return index


def places(answer):
    """Returns [(name of the film, start of the segment)]."""
    return [(hit.path.split("/")[-1], hit.segment_start) for hit in answer]


def test_subtitles_are_found_by_their_words(said):
    assert said.sources == ("picture", "speech")
    for options in ({"sources": ["speech"]}, {}):
        answer = said.query("interest rate", **options)  # endings do not matter
        assert places(answer)[0] == ("clip0.mp4", 0.0)
        match = answer[0].matches[0]
        assert (match.source, match.text) == ("speech", "The quarterly interest rates")
        assert (answer[0].start, answer[0].end, answer[0].second) == (0.5, 1.5, 0.5)
        assert not answer[0].weak
    alone = said.query("hammer", sources=["speech"])
    assert places(alone) == [("clip0.mp4", 4.0)]
    assert alone[0].score is None
    assert said.query("hammer")[0].score is not None


def test_query_whose_words_are_not_said_is_ranked_by_pictures(said):
    for text in ("a red dog", "interest in a blue cat", "the and of to", "?!", "\N{DOG FACE}"):
        fused, pictures = (said.query(text, k=50, sources=s) for s in (None, ["picture"]))
        assert [(hit.id, hit.score) for hit in fused] == [(hit.id, hit.score) for hit in pictures]
    # Without pictures, any word suffices.
    assert places(said.query("interest in a blue cat", sources=["speech"])) == [("clip0.mp4", 0.0)]
    assert said.query("a red dog", sources=["speech"]).hits == []


def test_quoted_words_must_be_said(said):
    assert places(said.query('"interest rates"')) == [("clip0.mp4", 0.0)]
    assert places(said.query('a red dog "rise again"')) == [("clip0.mp4", 2.0)]
    assert places(said.query('"to be or not to be"')) == [("clip0.mp4", 2.0)]  # common words only
    assert said.query('"interest rate"').hits == []  # exactly these words
    assert said.query('"rates rise"').hits == []  # of two segments
    assert said.query('"interest rates" "rise again"').hits == []
    with pytest.raises(InputError, match="no speech or text: quoted words must be said"):
        said.query('"interest"', sources=["picture"])


def test_filters_apply_to_what_is_said(said):
    assert said.query("interest", sources=["speech"], start=2.0).hits == []
    assert said.query("interest", sources=["speech"], path="clip1").hits == []
    answer = said.query("rising", sources=["speech"], start=2.5, end=3)
    assert places(answer) == [("clip0.mp4", 2.0)]
    assert (answer[0].start, answer[0].end, answer[0].second) == (2.5, 3.0, 2.5)
    for text in ("quarterly", '"quarterly interest"'):  # said before 1.6
        assert said.query(text, sources=["speech"], start=1.6, end=2.0).hits == []


def test_filters_are_applied_before_the_best_passages_are_chosen(said, films, monkeypatch):
    (films / "clip1.srt").write_text(SUBTITLES.replace("The quarterly", "Rates, rates, the"))
    said.add(films)
    monkeypatch.setattr(passages, "MAX_PASSAGES", 1)
    monkeypatch.setattr(querying, "MAX_PASSAGES", 1)
    for text in ("rates", '"interest rates"'):
        found = [places(said.query(text, sources=["speech"], path=f"clip{n}")) for n in (0, 1)]
        assert found == [[("clip0.mp4", 0.0)], [("clip1.mp4", 0.0)]]


def test_subtitles_that_change_are_read_again_without_the_film(said, films):
    (films / "clip1.srt").write_text(SUBTITLES.replace("interest", "mortgage"))
    summary = said.add(films)
    assert (summary.files, summary.unchanged, summary.texts) == (0, 2, 1)
    assert places(said.query("mortgage rates", sources=["speech"]))[0] == ("clip1.mp4", 0.0)
    (films / "clip1.srt").write_text(SUBTITLES.replace("interest", "exchange"))
    said.add(films)
    assert said.query("mortgage", sources=["speech"]).hits == []
    assert places(said.query("exchange", sources=["speech"])) == [("clip1.mp4", 0.0)]
    (films / "clip1.srt").unlink()
    said.add(films)
    assert said.query("exchange", sources=["speech"]).hits == []
    assert said.add(films).texts == 0


def test_subtitles_inside_a_film_are_found(said, films):
    cues = [(1, 2, b"the harbour"), (4.5, 6, b"at midnight")]
    write_with_streams(films / "inside.mkv", [("subrip", cues)], seconds=6)
    assert said.add(films).texts == 1
    found = said.query("midnight", sources=["speech"])
    assert [(hit.path.split("/")[-1], hit.start, hit.end) for hit in found] == [
        ("inside.mkv", 4.5, 6)
    ]


def test_text_is_removed_with_its_film(said, films):
    said.remove(films / "clip0.mp4")
    assert said.sources == ("picture",)
    with pytest.raises(InputError, match="has no speech: run index with --speech, or put"):
        said.query("interest", sources=["speech"])
    said.add(films)
    assert places(said.query("interest", sources=["speech"])) == [("clip0.mp4", 0.0)]


def test_text_of_a_killed_update_is_there_once(said, films, monkeypatch):
    (films / "clip1.srt").write_text(SUBTITLES)

    class Killed(BaseException): ...

    class Files:
        def __getattr__(self, name):
            return getattr(files, name)

        def add(self, _):
            raise Killed

    passages = said._store.passages
    files, passages._files = passages._files, Files()
    with pytest.raises(Killed):
        said.add(films)
    monkeypatch.undo()
    again = Index.open(said.location)
    monkeypatch.setattr(timed_text, "run_jobs", lambda f, jobs, done: done(0, f(jobs[0])))
    again.add(films)
    rows = lancedb.connect(said.location).open_table("passages").to_arrow()
    assert len(rows) == 6
    assert len(set(rows["id"].to_pylist())) == 6


def test_index_of_an_earlier_version_gets_text_when_it_is_updated(said, films):
    database = lancedb.connect(said.location)
    for name in ("passages", "read_texts", "calibration"):
        database.drop_table(name)
    old = Index.open(said.location)
    assert (old.sources, old.examples) == (("picture",), [])
    assert not any(hit.weak for hit in old.query("a red dog"))
    assert old.add(films).texts == 1
    assert places(old.query("interest", sources=["speech"])) == [("clip0.mp4", 0.0)]


def test_text_that_several_processes_add_first_is_kept(tmp_path):
    location = str(tmp_path / "index")
    Store.create(location, {"max_frames": 2, "embed_dim": 4, "precision": "float32"})
    # Those who create a table together may replace what one of them has added.
    assert {"passages", "read_texts"} <= set(lancedb.connect(location).table_names())

    def add(number):
        found = Found(f"/{number}.mp4", (1, 1, ""), {str(number): [Line(0.0, 1.0, "hello")]})
        writer = Passages(location)
        barrier.wait()
        retry_commit(lambda: writer.add("subtitles", [found]))

    barrier = threading.Barrier(4)
    run_together(*(functools.partial(add, number) for number in range(4)))
    reader = Passages(location)
    assert {passage.id for passage in reader.search("hello", sources=["speech"])} == set("0123")
    assert reader.paths() == {f"/{number}.mp4" for number in range(4)}


def test_problems_of_subtitles_are_listed(said, films):
    (films / "clip1.srt").write_bytes(bytes(range(256)) * 9)
    summary = said.add(films)
    assert summary.partial == {str(films / "clip1.mp4"): "subtitles: clip1.srt: not a text file"}


def test_speech_is_transcribed_once(said, films, monkeypatch):
    heard = []

    class Stub(timed_text.Transcriber):
        def __init__(self, model):
            assert model == "tiny"

        def transcribe(self, path):
            heard.append(path.split("/")[-1])
            return [Line(4.5, 5.5, "A whale sings")]

    monkeypatch.setattr(timed_text, "Transcriber", Stub)
    said.add(films, speech="tiny")
    assert said.add(films, speech="tiny").texts == 0
    assert heard == ["clip0.mp4", "clip1.mp4"]
    found = said.query("whales singing", sources=["speech"])
    assert sorted(places(found)) == [("clip0.mp4", 4.0), ("clip1.mp4", 4.0)]
    assert places(said.query("interest", sources=["speech"])) == [("clip0.mp4", 0.0)]


def test_text_on_screen_is_a_source_of_its_own(said, films, monkeypatch):
    lines = [Line(0.0, 2.0, "EXIT ONLY"), Line(2.0, 6.0, "interest free")]
    monkeypatch.setattr(timed_text, "load_engine", lambda: None)
    monkeypatch.setattr(timed_text, "read_screen_text", lambda path: lines)
    said.add(films, ocr=True)
    assert said.sources == ("picture", "speech", "text")
    assert set(places(said.query("exit only", sources=["text"]))) == {
        ("clip0.mp4", 0.0),
        ("clip1.mp4", 0.0),
    }
    assert said.query("exit", sources=["speech"]).hits == []
    both = said.query("interest", sources=["speech", "text"], k=50, merge=False)
    assert {hit.matches[0].source for hit in both} == {"speech", "text"}


def test_commands_search_what_is_said(said, films, capsys):
    main(["query", '"interest rates"', f"--index={said.location}"])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert out[2].strip() == "said at 0:00: The quarterly interest rates"
    main(["query", "hammers", f"--index={said.location}", "--in=speech", "--json"])
    (hit,) = json.loads(capsys.readouterr().out)["hits"]
    assert (hit["score"], hit["matches"][0]["source"]) == (None, "speech")
    for option, message in (
        ("--in=sound", "must be of picture, speech, text, not"),
        ("--in=text", "has no"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["query", "hammers", f"--index={said.location}", option])


def test_queries_of_common_words_are_phrases(said):
    assert places(said.query("to be or not", sources=["speech"])) == [("clip0.mp4", 2.0)]
    assert said.query("not or be to", sources=["speech"]).hits == []
    assert places(said.query('rises "to be or not"', sources=["speech"])) == [("clip0.mp4", 2.0)]
    assert places(said.query('carpenter "to be or not"', k=5))[0] == ("clip0.mp4", 2.0)


@pytest.mark.parametrize("error", [AccessError("offline"), RuntimeError("no memory"), None])
def test_temporary_problems_of_a_reader_are_tried_again(said, films, monkeypatch, error):
    (films / "clip1.srt").write_text(SUBTITLES.replace("interest", "mortgage"))

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        if error is None:  # the process crashed
            patch.setattr(timed_text, "run_jobs", lambda _, jobs, done: done(0, None))
        else:
            patch.setattr(timed_text, "read_subtitles", fail)
        (problem,) = said.add(films).partial.values()
    assert (str(error) if error else "crashed") in problem
    assert said.add(films).texts == 1
    assert places(said.query("mortgage", sources=["speech"])) == [("clip1.mp4", 0.0)]


def test_text_of_films_that_are_gone_is_removed(said, films):
    said._store._segments.delete("path LIKE '%clip0.mp4'")  # and then it was killed
    (films / "clip0.mp4").unlink()
    again = Index.open(said.location)
    again.add(films)
    assert again.sources == ("picture",)


def test_lost_full_text_index_is_made_again(said, films):
    table = lancedb.connect(said.location).open_table("passages")
    table.drop_index(table.list_indices()[0].name)
    (films / "clip1.srt").write_text(SUBTITLES)
    again = Index.open(said.location)
    again.add(films)
    assert len(again.query("the hammering", sources=["speech"])) == 2


def test_new_text_alone_is_a_new_version(said, films):
    reader = Index.open(said.location)
    assert not reader.refresh()
    (films / "clip1.srt").write_text(SUBTITLES)
    said.add(films)
    assert reader.refresh()
    assert len(reader.query("hammers", sources=["speech"])) == 2


def test_shortest_run_of_lines_matches():
    lines = ["the cat", "and the dog", "run the race", "home again"]
    assert match_lines(lines, "dog running", []) == [1, 2]
    assert match_lines(lines, "the cat", []) == [0]
    assert match_lines(lines, "x", ["dog run"]) == [1, 2]
    assert match_lines(lines, "cat", ["again"]) == [3]
    assert match_lines(lines, "nothing", []) == []
    assert match_lines(lines, "", ["home", "the dog run"]) == [1, 2, 3]
    assert match_lines(["a whale"] * 99, "whale", []) == list(range(10))
    assert match_lines(["the weather the sky", "our president"], "the president", []) == [1]
    assert match_lines(["bonjour", "le caf\u00e9 ferme"], "cafe", []) == [1]
    assert match_lines(["hello", "rock'n'roll"], "rocks", []) == [1]


def write_text_film(path, texts):
    """Writes a film of eight seconds that shows a text in each half."""
    font = ImageFont.load_default(size=30)
    pictures = []
    for text in texts:
        image = Image.new("RGB", (640, 360), (30, 60, 90))
        ImageDraw.Draw(image).text((40, 150), text, font=font, fill="white")
        pictures += [np.asarray(image)] * 8
    write(path, at_rate(2, len(pictures)), pictures)


def test_rendered_text_is_found_alone_and_in_fusion(model, tmp_path):
    pytest.importorskip("rapidocr")
    folder = tmp_path / "films"
    folder.mkdir()
    write_text_film(folder / "sign.mp4", ["Platform nine", "Mind the gap"])
    write_text_film(folder / "other.mp4", ["Green valley farm", "Fresh apples"])
    index = Index.create(tmp_path / "index", model, segment_seconds=4)
    before = Index.create(tmp_path / "plain", model, segment_seconds=4)
    index.add(folder, ocr=True)
    before.add(folder)
    for text, place in {
        "mind the gap": ("sign.mp4", 4.0),
        "fresh apple": ("other.mp4", 4.0),
        '"green valley"': ("other.mp4", 0.0),
    }.items():
        assert places(index.query(text, sources=["text"])) == [place]
        hit = index.query(text)[0]
        assert places([hit]) == [place]
        assert hit.matches[0].source == "text"
    found, expected = (one.query("a red dog", k=9) for one in (index, before))
    assert [(hit.start, hit.score) for hit in found] == [(h.start, h.score) for h in expected]
