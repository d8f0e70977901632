"""Tests of `python -m xclip_jax.search`."""

import json
import socket
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from xclip_jax.search import Index, indexing, output, results
from xclip_jax.search.__main__ import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes a folder with `model`, `videos` and their `index`."""
    folder = tmp_path_factory.mktemp("search")
    tiny.make_model(folder / "model")
    tiny.make_videos(folder / "videos", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "run_jobs", tiny.run_jobs_here)
        main(["index", str(folder / "videos"), "--model", f"{folder}/model", *at(folder)])
    return folder


@pytest.fixture(autouse=True)
def work_in_folder(folder, monkeypatch):
    monkeypatch.setattr(indexing, "run_jobs", tiny.run_jobs_here)
    monkeypatch.chdir(folder)


def at(folder="."):
    return ["--index", f"{folder}/index"]


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code not in (None, 0)
    return str(stop.value.code) + capsys.readouterr().err


def test_commands_run_as_programs(folder, tmp_path):
    """Starts worker processes. stdout holds only the result."""
    command = [sys.executable, "-m", "xclip_jax.search"]
    index = ["--index", str(tmp_path / "index")]
    made = subprocess.run(
        [*command, "index", "videos", "--model=model", *index], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert "4 files read" in made.stdout
    assert "4 segments of 4 files" in made.stdout
    queried = subprocess.run(
        [*command, "query", "a red dog", "--json", *index], capture_output=True, text=True
    )
    answer = json.loads(queried.stdout)
    assert answer["searched"] == 4
    assert answer["hits"][0]["path"].startswith(str(folder / "videos"))


def test_index_of_missing_videos_is_not_created(tmp_path, capsys):
    arguments = ["index", "/nowhere", "--model=model", "--index", str(tmp_path / "new")]
    assert "no such file or folder of videos: /nowhere" in error_of(capsys, *arguments)
    assert not (tmp_path / "new").exists()


def test_query_prints_a_table(capsys):
    main(["query", "a red dog", "-k", "3", *at()])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["rank", "score", "best", "moment", "file"]
    hits = Index.open("index").query("a red dog", k=3)
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert [line.split()[4] for line in lines] == [
        f"videos/{hit.path.split('/')[-1]}" for hit in hits
    ]
    assert [line.endswith("(weak match)") for line in lines] == [hit.weak for hit in hits]
    assert lines[0].split()[1:4] == [
        f"{hits[0].score:.2f}",
        f"0:0{hits[0].second:.0f}",
        f"0:0{hits[0].start:.0f}-0:0{int(hits[0].end)}",
    ]


def test_query_options_filter_and_format_results(capsys):
    main(["query", "a red dog", "--exhaustive", "--path=clip1", "--json", *at()])
    answer = json.loads(capsys.readouterr().out)
    assert [hit["path"].endswith("clip1.mp4") for hit in answer["hits"]] == [True]
    main(["query", "--video=videos/clip2.mp4", "--json", "-k1", *at()])
    assert len(json.loads(capsys.readouterr().out)["hits"]) == 1
    main(["query", "a red dog", "--start=100", *at()])
    assert capsys.readouterr().out.startswith("no results")


def test_captions_are_ranked_for_a_video(folder, capsys):
    (folder / "captions.txt").write_text("a red dog\n\n a blue cat \n")
    main(["query", "--video=videos/clip0.mp4", "--captions=captions.txt", *at()])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(maxsplit=2)[2] for line in lines[1:]} == {"a red dog", "a blue cat"}


def test_results_are_saved_as_a_picture(tmp_path):
    picture = tmp_path / "grid.png"
    main(["query", "a red $dog$ \N{DOG FACE}", "--save_grid", str(picture), *at()])
    with Image.open(picture) as image:
        assert image.width > 1000
        assert np.asarray(image.convert("RGB")).std() > 20


def test_open_starts_the_player_at_the_best_second(folder, monkeypatch):
    played = []
    monkeypatch.setattr(output.shutil, "which", lambda name: name == "vlc")
    monkeypatch.setattr(output.subprocess, "Popen", played.append)
    main(["query", "a red dog", "--open", *at()])
    hit = Index.open("index").query("a red dog")[0]
    assert played == [["vlc", f"--start-time={hit.second}", hit.path]]


def test_recall_of_a_wide_funnel_is_complete(capsys, folder):
    main(["recall", "--sample=5", "--json", *at()])
    result = json.loads(capsys.readouterr().out)
    assert (result["top_1"], result["top_10"], result["sentences"]) == (100, 100, 5)
    assert result["milliseconds"]["total"]["p50"] > 0
    (folder / "queries.txt").write_text("a red dog\na cat\n")
    main(["recall", "--queries=queries.txt", "--rerank=1", *at()])
    out = capsys.readouterr().out
    assert "2 sentences, 4 segments, funnel 5,000 -> 1" in out


def test_recall_counts_results_missing_from_the_funnel(capsys, folder, monkeypatch):
    exhaustive = Index.query_exhaustively

    def rotated(index, texts, **options):
        return [answer.hits[1:] + answer.hits[:1] for answer in exhaustive(index, texts, **options)]

    # The funnel returns one of four segments, and another one is ranked first.
    monkeypatch.setattr(Index, "query", lambda index, text, **_: exhaustive(index, [text], k=1)[0])
    monkeypatch.setattr(Index, "query_exhaustively", rotated)
    main(["recall", "--sample=5", "--json", *at()])
    result = json.loads(capsys.readouterr().out)
    assert (result["top_1"], result["top_10"]) == (0, 25)


@pytest.mark.parametrize("name", ["out.npz", "folder/out.parquet"])
def test_exported_files_contain_all_segments(tmp_path, name):
    main(["export", "--output", str(tmp_path / name), *at()])
    video = np.concatenate(
        [np.stack(table["video"].to_pylist()) for table in Index.open("index").tables()]
    )
    if name.endswith("npz"):
        with np.load(tmp_path / name) as arrays:
            assert arrays["frames"].shape == (4, 4, 32)
            assert arrays["path"][0].endswith(".mp4")
            np.testing.assert_array_equal(arrays["video"], video.astype(np.float32))
    else:
        table = pq.read_table(tmp_path / name)
        assert len(set(table["id"].to_pylist())) == 4
        np.testing.assert_array_equal(np.stack(table["video"].to_pylist()), video)
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [name.split("/")[-1]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["query", "", *at()], "the sentence is empty"),
        (["query", *at()], "query requires exactly one of: a sentence, --video, --image"),
        (["query", "a", "--video=b", *at()], "query requires exactly one of"),
        (["query", "a", "-k", "0", *at()], "-k 0: must be at least 1"),
        (["query", "a", "--index=nowhere"], "no index in"),
        (["query", "a", "--captions=c.txt", *at()], "--captions requires --video"),
        (["query", "--video=gone.mp4", *at()], "gone.mp4"),
        (["query", "--image=model/model.json", *at()], "model.json"),
        (["query", "--video=videos/clip0.mp4", "--captions=model/params", *at()], "is a folder"),
        (
            ["query", "--video=videos/clip0.mp4", "--exhaustive", *at()],
            "--exhaustive requires a sentence",
        ),
        (["query", "a"], "--index"),
        (["query", "a", "--save_grid=a.xyz", *at()], "must be a .png file"),
        (["query", "a", "--save_grid=nowhere/a.png", *at()], "in an existing folder"),
        (["export", "--output=a.csv", *at()], "must end in .parquet or .npz"),
        (["export", "--output=s3://a.npz", *at()], "must be a path of this machine"),
        (["query", "a", "--save_grid=s3://a.png", *at()], "must be a path of this machine"),
        (["recall", "--sample=99999", *at()], "at most 4000"),
        (["index", "videos", "--index=new"], "--model is required"),
        (["index", "videos", "--index=new", "--model=nowhere"], "no model in"),
        (["index", "nowhere", *at()], "no such file or folder"),
        (["index", "model", *at()], "no video files in model"),
        (["index", "videos", "--segment_seconds=7", *at()], "was made with 10"),
        (["index", "videos", "--segment_seconds=0", *at()], "must be at least 1"),
        (["index", "videos", "--precision=float16", *at()], "was made with float32"),
        (["serve", "--index=nowhere"], "no index in"),
        ([], "COMMAND"),
    ],
)
def test_invalid_input_is_a_one_line_error(capsys, arguments, expected):
    message = error_of(capsys, *arguments)
    assert expected in message
    assert "Traceback" not in message


def test_taken_port_is_an_error_before_the_index_is_opened(capsys, monkeypatch):
    monkeypatch.setattr(Index, "open", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = error_of(capsys, "serve", "--shards=2", f"--port={port}", *at())
    assert f"cannot listen on 127.0.0.1, port {port}: " in message


def test_index_of_only_unreadable_videos_is_an_error(capsys, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    message = error_of(
        capsys, "index", str(tmp_path), "--model=model", "--index", str(tmp_path / "index")
    )
    assert "no video could be read" in message
    assert "unreadable: " in message


@pytest.mark.parametrize("command", ["index", "query", "serve", "recall", "export"])
def test_each_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--index" in capsys.readouterr().out


def test_times_are_printed_as_minutes_and_seconds():
    assert [results.format_time(s) for s in (0, 59.9, 61, 3600, 7325.2)] == [
        *("0:00", "0:59", "1:01", "1:00:00", "2:02:05")
    ]
