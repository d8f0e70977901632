"""Tests of reading the text in a film's pictures."""

import socket
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from video_files import at_rate, grey, write

from xclip_jax.cli import InputError
from xclip_jax.data.video import Picture, VideoError
from xclip_jax.search import screen_text
from xclip_jax.search.lines import Line
from xclip_jax.search.screen_text import Box, group_boxes, load_engine, read_screen_text


def picture(*rows, size=(640, 360), font_size=28, background=(40, 80, 60)):
    """Returns a picture with [(left, top, text)]."""
    image = Image.new("RGB", size, background)
    font = ImageFont.load_default(size=font_size)
    for left, top, text in rows:
        ImageDraw.Draw(image).text((left, top), text, font=font, fill="white")
    return np.asarray(image)


class StubEngine:
    """An engine that reads given rows: one list of (text, confidence) for each call."""

    def __init__(self, readings):
        self.readings, self.calls = iter(readings), 0

    def __call__(self, image):
        self.calls += 1
        rows = next(self.readings)
        if not rows:
            return SimpleNamespace(boxes=None, txts=None, scores=None)
        tops = [100 * k for k in range(len(rows))]
        boxes = np.array([[[0, y], [90, y], [90, y + 20], [0, y + 20]] for y in tops], float)
        texts, scores = zip(*rows, strict=True)
        return SimpleNamespace(boxes=boxes, txts=texts, scores=scores)


@pytest.fixture
def stub(monkeypatch):
    """Returns a function that replaces the engine."""

    def replace(*readings):
        engine = StubEngine(readings)
        monkeypatch.setattr(screen_text, "load_engine", lambda threads: engine)
        return engine

    return replace


def test_text_is_read_with_its_times_from_a_film(tmp_path, capfd):
    pytest.importorskip("rapidocr")
    empty, two_rows = picture(), picture((50, 250, "Breaking news from"), (50, 285, "the harbour"))
    logo = [(480, 20, "CHANNEL 5")]
    shown = picture(*logo, (50, 250, "Breaking news from"), (50, 285, "the harbour"))
    pictures = [empty] * 3 + [shown] * 4 + [two_rows] * 3 + [empty] * 2
    path = write(tmp_path / "a.mp4", at_rate(1, 12), pictures)
    assert read_screen_text(path, interval=1) == [
        Line(3, 7, "CHANNEL 5"),
        Line(3, 10, "Breaking news from the harbour"),
    ]
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_models_are_loaded_without_network(monkeypatch):
    pytest.importorskip("rapidocr")

    def refuse(*arguments):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_engine.cache_clear()
    boxes = screen_text.read_boxes(load_engine(), Image.fromarray(picture((50, 50, "Hello"))))
    assert [box.text for box in boxes] == ["Hello"]


def test_missing_models_are_an_error_and_not_downloaded(monkeypatch, tmp_path):
    rapidocr = pytest.importorskip("rapidocr")
    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    load_engine.cache_clear()
    with pytest.raises(InputError, match=r"expected in .*models, found none: run pip install"):
        load_engine()


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_missing_package_is_an_error_that_says_what_to_install(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    load_engine.cache_clear()
    with pytest.raises(InputError, match=r"run pip install -e '.\[ocr\]'"):
        load_engine()


@pytest.mark.parametrize("size", [(2, 2), (2048, 2), (2, 2048), (4096, 16)])
def test_frames_of_extreme_sizes_have_no_text(size):
    pytest.importorskip("rapidocr")
    load_engine.cache_clear()
    frame = Picture(Image.new("RGB", size, "grey"), Fraction(1))
    image = screen_text._scale(frame)
    assert max(image.size) <= screen_text.LONGEST
    assert screen_text.read_boxes(load_engine(), image) == []


def test_engine_gets_blue_first_and_no_narrow_pictures():
    pictures = []
    engine = StubEngine([[], []])

    def read(size):
        def keep(image):
            pictures.append(image)
            return engine(image)

        return screen_text.read_boxes(keep, Image.new("RGB", size, (1, 2, 3)))

    assert read((64, 31)) == read((31, 64)) == read((64, 32)) == []
    (array,) = pictures
    assert array.shape == (32, 64, 3)
    assert array[0, 0].tolist() == [3, 2, 1]


def test_unchanged_pictures_are_read_once(tmp_path, stub):
    engine = stub([("one", 0.99)], [("two", 0.99)])
    path = write(tmp_path / "a.mp4", at_rate(1, 12), [grey(0)] * 6 + [grey(9)] * 6)
    lines = read_screen_text(path, interval=1)
    assert engine.calls == 2
    assert [(line.start, line.text) for line in lines] == [(0, "one"), (6, "two")]
    assert [line.end for line in lines] == [6, pytest.approx(12, abs=0.1)]


def test_small_text_is_a_change(tmp_path, stub):
    engine = stub([], [("Hi", 0.99)])
    pictures = [picture()] * 2 + [picture((300, 180, "Hi"), font_size=10)] * 2
    read_screen_text(write(tmp_path / "a.mp4", at_rate(1, 4), pictures), interval=1)
    assert engine.calls == 2


def test_different_readings_of_a_text_are_one_line(tmp_path, stub):
    stub(
        [("Meet me at nlne thirty", 0.85), ("Score 24:10", 0.9)],
        [("Meet me at nine thirty", 0.97), ("Score 24:11", 0.9)],
        [("Meet me at nine thirtv", 0.9)],
        [],
        [("Meet me at nine thirty", 0.97)],
    )
    path = write(tmp_path / "a.mp4", at_rate(1, 5), [grey(10 * k) for k in range(5)])
    lines = read_screen_text(path, interval=1)
    assert [(line.start, line.text) for line in lines] == [
        (0, "Meet me at nine thirty"),
        (0, "Score 24:10"),
        (1, "Score 24:11"),
        (4, "Meet me at nine thirty"),
    ]
    assert [line.end for line in lines[:3]] == [3, 1, 2]


def test_uncertain_rows_and_rows_without_a_word_are_left_out(tmp_path, stub):
    stub([("maybe", 0.79), ("- ! -", 0.99), ("一", 0.99), ("sure", 0.8)])
    path = write(tmp_path / "a.mp4", at_rate(1, 1))
    assert [line.text for line in read_screen_text(path)] == ["sure"]


def test_text_of_the_last_picture_that_is_read_has_a_length(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(screen_text, "MAX_LINES", 1)
    stub([("one", 0.99), ("two", 0.99)])
    path = write(tmp_path / "a.mp4", at_rate(1, 5))
    assert read_screen_text(path) == [Line(0, 3, "one")]


def test_adjacent_rows_are_one_block_in_reading_order():
    def box(left, top, text, width=100, height=20):
        return Box(left, top, left + width, top + height, text, 0.9)

    rows = [
        box(120, 303, "second"),
        box(10, 300, "first"),
        box(10, 325, "below"),
        box(500, 300, "elsewhere"),
        box(10, 400, "further"),
        box(10, 10, "TITLE", height=60),
        box(10, 72, "subtitle"),
    ]
    texts = [block.text for block in group_boxes(rows)]
    assert texts == ["TITLE", "subtitle", "first second below", "elsewhere", "further"]


def test_many_boxes_take_little_time():
    boxes = [
        Box(x, y, x + 9, y + 9, "a", 0.9) for x in range(0, 999, 33) for y in range(0, 999, 33)
    ]
    assert len(group_boxes(boxes)) == 100


def test_invalid_interval_and_film_are_errors(tmp_path, stub):
    stub()
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    with pytest.raises(VideoError, match="cannot be opened"):
        read_screen_text(tmp_path / "a.mp4")
    for interval in (0, -1, float("nan"), 0.01):
        with pytest.raises(InputError, match=r"at least 0\.1 seconds"):
            read_screen_text(tmp_path / "a.mp4", interval=interval)
