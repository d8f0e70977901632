"""Tests of queries with several right videos: their file, their recalls, the printed table."""

import json
import re

import numpy as np
import pytest
import tiny

import xclip_jax
from xclip_jax import evaluate, train
from xclip_jax.cli import InputError
from xclip_jax.data.annotations import read_queries
from xclip_jax.data.builder import Dataset
from xclip_jax.data.preprocess import decode_jpeg

VIDEOS = ["a.mp4", "b.mp4", "c.mp4"]


def write(path, *lines):
    texts = (line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_text("".join(texts))
    return path


def test_queries_are_read_with_all_right_videos(tmp_path):
    first, second = {"text": "a", "videos": ["c.mp4", "a.mp4"]}, {"text": "b", "videos": ["b.mp4"]}
    texts, right_QxV = read_queries(write(tmp_path / "q.jsonl", first, "\n", second), VIDEOS)
    assert texts == ["a", "b"]
    np.testing.assert_array_equal(right_QxV, [[True, False, True], [False, True, False]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"text": "a", "videos": ["d.mp4"]},
            r"q\.jsonl, line 1: video 'd.mp4': must be one of the 3",
        ),
        ({"text": "a", "videos": []}, "line 1: must have a sentence and at least one video"),
        ({"text": " ", "videos": ["a.mp4"]}, "line 1: must have a sentence"),
        ({"text": "a"}, "line 1: has no 'videos'"),
        ({"text": "a", "videos": "a.mp4"}, "'videos': must be list, is str"),
        ({"text": "a", "videos": [["a.mp4"]]}, "line 1: must be str, is list"),
        ("nonsense\n", "line 1: invalid JSON"),
        ("", "contains no queries"),
    ],
)
def test_invalid_queries_are_errors_that_name_the_line(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        read_queries(write(tmp_path / "q.jsonl", line), VIDEOS)


def test_evaluation_counts_any_right_video(tmp_path, capsys):
    config = tiny.make_config(tiny.make_dataset(tmp_path / "data", ("train", "test")), epochs=0)
    train.train(config, tmp_path / "run")
    retriever = xclip_jax.load(tmp_path / "run")
    clips = Dataset(config.data.path).clips("test")
    frames = [np.stack([decode_jpeg(jpeg) for jpeg in clip["frames"]]) for clip in clips]
    best, second, *_, worst = (m.index for m in retriever.search("red, then blue", frames, k=12))
    write(
        tmp_path / "data/of_colours.jsonl",
        {"text": "red, then blue", "videos": [f"clip{best}"]},
        {"text": "red, then blue", "videos": [f"clip{second}", f"clip{worst}"]},
        {"text": "red, then blue", "videos": [f"clip{worst}"]},
    )
    config.eval.queries = "of_colours.jsonl"
    queries = evaluate.evaluate(config, tmp_path / "run")["queries"]
    assert (queries["name"], queries["num_texts"]) == ("of colours", 3)
    assert queries["mean_right_videos"] == pytest.approx(4 / 3)
    assert list(queries["text_to_video"].values()) == pytest.approx([100 / 3, 200 / 3, 200 / 3])
    assert queries["chance"]["R@1"] == pytest.approx(100 * (1 + 2 + 1) / 12 / 3)
    assert json.loads((tmp_path / "run/results.json").read_text())["queries"] == queries
    printed = capsys.readouterr().out
    assert re.search(r"^3 of colours +33\.3 +66\.7 +66\.7 +- +-$", printed, re.MULTILINE)
    assert re.search(r"^  in random order +11\.1 ", printed, re.MULTILINE)
    page = (tmp_path / "run/report/index.html").read_text()
    assert "<th>3 of colours</th>" in page
    assert "several right videos" in page

    config.eval.queries = "nothing.jsonl"
    with pytest.raises(InputError, match=r"'nothing.jsonl': no file .*data/nothing\.jsonl"):
        evaluate.evaluate(config, tmp_path / "run")
    with pytest.raises(InputError, match=r"no file .*data/nothing\.jsonl"):  # before training
        train.Setup(config)
