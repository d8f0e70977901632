"""Tests of the README's sentences about the demo's clips: each fits the clips that it names."""

import contextlib
import functools
import io
import re

import pytest
from demo import ROOT, train_demo

from xclip_jax.data import rendered
from xclip_jax.data.scenes import Event, Sentence, fits

TEST_CLIPS = 220
# {sentence about the demo's clips in README.md, the docs or their pictures: its meaning}
SENTENCES = {
    "a blue ball moves to the left": [Event("blue", "circle", "", "left")],
    "a green cross gets bigger": [Event("green", "cross", "", "grow")],
    "a small blue cross follows a large yellow triangle": [
        Event("yellow", "triangle", "large", ""),
        Event("blue", "cross", "small", ""),
    ],
}


@functools.cache
def draw(split, count):
    return rendered.draw_scenes(split, count)


def python_snippet():
    text = (ROOT / "README.md").read_text("utf-8")
    section = text[text.index("## Python API") :]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def shown_output(snippet):
    return [line.removeprefix("# ") for line in snippet.splitlines() if line.startswith("# ")]


def right_clips(sentence):
    meaning = Sentence(sentence, tuple(SENTENCES[sentence]))
    return [n for n, scene in enumerate(draw("test", TEST_CLIPS)) if fits(meaning, scene)]


def test_sentences_use_words_of_the_training_captions():
    captions = (caption for scene in draw("train", 1000) for caption in scene.captions)
    known = {word.strip(",") for caption in captions for word in caption.split()}
    for sentence in SENTENCES:
        assert {word.strip(",") for word in sentence.split()} <= known, sentence


def test_snippet_names_exactly_the_clips_that_its_sentences_fit():
    snippet = python_snippet()
    searched, *others = [text for text in re.findall(r'"([^"]*)"', snippet) if " " in text]
    *paths, best = shown_output(snippet)
    assert [int(re.findall(r"test_(\d+)\.mp4", path)[0]) for path in paths] == right_clips(searched)
    assert [[int(number)] for number in re.findall(r"\d+", best)] == [*map(right_clips, others)]


@pytest.mark.slow
def test_snippet_prints_what_readme_shows():
    snippet, printed = python_snippet(), io.StringIO()
    with contextlib.chdir(train_demo()), contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), {})
    # Equally right clips may change places on another machine.
    assert sorted(printed.getvalue().splitlines()) == sorted(shown_output(snippet))
