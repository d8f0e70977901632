"""Tests of writing down speech, with a random model of the real kind and with a stub."""

import socket
import sys
from types import SimpleNamespace

import hub_server
import pytest
from video_files import at_rate, write
from whisper_files import beeps, write_film, write_whisper

from xclip_jax.cli import InputError
from xclip_jax.data import sound
from xclip_jax.data.video import VideoError
from xclip_jax.search.lines import Line
from xclip_jax.search.speech import Transcriber

faster_whisper = pytest.importorskip("faster_whisper")


class StubEngine:
    """An engine that hears the same in every piece: [(start, end, text)]."""

    feature_extractor = SimpleNamespace(sampling_rate=16_000)

    def __init__(self, heard):
        self.heard, self.lengths = heard, []

    def transcribe(self, samples, **options):
        self.lengths.append(len(samples) / 16_000)
        return (SimpleNamespace(start=a, end=b, text=text) for a, b, text in self.heard), None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_whisper(tmp_path_factory.mktemp("models") / "whisper")


@pytest.fixture
def stub(model):
    """Returns a function that makes a Transcriber that hears the given sentences."""

    def make(*heard):
        transcriber = Transcriber(str(model))
        transcriber.engine = StubEngine(heard)
        return transcriber

    return make


def refuse_network(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_model_of_a_folder_is_loaded_without_network_and_writes_lines(tmp_path, model, monkeypatch):
    refuse_network(monkeypatch)
    path = write_film(tmp_path / "a.mp4", beeps(5, loud=[(1, 2)]))
    lines = Transcriber(str(model), vad=False, threads=1).transcribe(path)
    assert lines
    assert lines == sorted(lines)
    for line in lines:
        assert 0 <= line.start < line.end <= 5.7
        assert set(line.text) <= set(" abcdefghijklmnopqrstuvwxyz.,!?'")


def test_sound_without_speech_has_no_lines(tmp_path, model):
    path = write_film(tmp_path / "a.mp4", beeps(5))
    assert Transcriber(str(model)).transcribe(path) == []


def test_film_without_sound_has_no_lines(tmp_path, stub):
    assert stub((0, 1, "a")).transcribe(write(tmp_path / "a.mp4", at_rate(1, 3))) == []


def test_times_count_from_the_first_frame(tmp_path, stub):
    path = write_film(tmp_path / "a.mkv", beeps(8), codec="flac", video_start=2.0)
    transcriber = stub(
        (0, 1, "before"), (3, 4.5, " During\n it "), (7, 99, "end"), (9, 10, "after")
    )
    assert transcriber.transcribe(path) == [
        Line(0, 1, "before"),
        Line(1, 2.5, "During it"),
        Line(5, 6, "end"),
    ]


def test_sentence_without_length_gets_one(tmp_path, stub):
    path = write_film(tmp_path / "a.mkv", beeps(8), codec="flac")
    assert stub((1, 1, "a"), (2, 1.5, "b")).transcribe(path) == [Line(1, 2, "a"), Line(2, 5, "b")]


def test_pieces_of_long_sound_are_one_text(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(sound, "PIECE_SECONDS", 4)
    monkeypatch.setattr(sound, "_CUT_SECONDS", 2)
    path = write_film(tmp_path / "a.mkv", beeps(9, loud=[(0, 3), (3.2, 9)]), codec="flac")
    transcriber = stub((0.5, 1, "a"))
    lines = transcriber.transcribe(path)
    lengths = transcriber.engine.lengths
    starts = [0.5, lengths[0] + 0.5, lengths[0] + lengths[1] + 0.5]
    assert [line.start for line in lines] == pytest.approx(starts)
    assert sum(lengths) == pytest.approx(9, abs=0.1)


def test_playlist_is_refused(tmp_path, stub):
    write_film(tmp_path / "other.mp4", beeps(2))
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    with pytest.raises(VideoError, match="cannot be opened"):
        stub((0, 1, "a")).transcribe(tmp_path / "a.mp4")


def test_model_is_downloaded_from_the_hub_once(tmp_path, model, monkeypatch):
    with hub_server.serve(monkeypatch, tmp_path / "cache") as hub:
        files = {file.name: file.read_bytes() for file in model.iterdir()}
        hub.add_commit("someone/whisper", files | {"other.bin": b"not needed"})
        first = Transcriber("someone/whisper").engine
        requests = len(hub.requests)
    assert first.model.n_mels == 80
    assert not list((tmp_path / "cache").rglob("other.bin"))
    assert requests


def test_name_of_the_hub_without_network_is_an_error_that_says_what_to_do(monkeypatch):
    refuse_network(monkeypatch)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with pytest.raises(InputError, match=r"cannot be reached.*hf download Systran/.*--local-dir"):
        Transcriber("someone/a-model-that-is-nowhere")


def test_missing_folder_and_unknown_name_are_errors(tmp_path):
    for name in (str(tmp_path / "missing"), "huge", "", "a/b/c"):
        with pytest.raises(InputError, match=r"no folder .*hf download .* names tiny\.en, tiny"):
            Transcriber(name)


@pytest.mark.parametrize("name", ["model.bin", "config.json", "tokenizer.json", "vocabulary.json"])
def test_incomplete_model_is_an_error_and_not_completed_from_the_hub(tmp_path, monkeypatch, name):
    refuse_network(monkeypatch)
    folder = write_whisper(tmp_path / "whisper")
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"without {name}: pass the folder"):
        Transcriber(str(folder))


@pytest.mark.parametrize("name", ["model.bin", "config.json", "tokenizer.json", "vocabulary.json"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 999])
def test_corrupted_model_is_an_error(tmp_path, name, content):
    folder = write_whisper(tmp_path / "whisper")
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match="is not a readable model"):
        Transcriber(str(folder))


def test_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(InputError, match=r"run pip install -e '.\[asr\]'"):
        Transcriber("small")
