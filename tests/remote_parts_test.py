"""Tests of how the front end waits for parts, with stand-ins for Ray's handles."""

import threading
import time

import pytest

from xclip_jax.cli import InputError
from xclip_jax.search import sharded
from xclip_jax.search.results import Answer
from xclip_jax.search.shards import LostError

exceptions = pytest.importorskip("ray.exceptions", reason="Ray is not installed")


class Call:
    """A call that is answered after some seconds, None: never."""

    def __init__(self, seconds, answer):
        self.end, self.answer = None if seconds is None else time.monotonic() + seconds, answer

    def result(self, timeout_s):
        left = timeout_s if self.end is None else self.end - time.monotonic()
        time.sleep(max(0.0, min(left, timeout_s)))
        if self.end is None or left > timeout_s:
            raise TimeoutError
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Method:
    def __init__(self, make):
        self.remote = make


class Handle:
    """A part that answers with its arguments after some seconds, and to pings after others."""

    def __init__(self, seconds=0.0, ping=0.0, error=None):
        self.ask = Method(lambda *arguments: Call(seconds, error or arguments))
        self.ping = Method(lambda: Call(ping, True))


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(sharded, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(sharded, "PING_SECONDS", 0.1)
    monkeypatch.setattr(sharded, "WAIT_SECONDS", 2.0)


def ask(*handles):
    parts = sharded.RemoteParts(list(handles), 7)
    return parts.ask("count", {number: (number,) for number in range(len(handles))})


def test_parts_are_asked_for_a_version_at_the_same_time():
    begin = time.monotonic()
    answers = ask(*(Handle(0.3) for _ in range(4)))
    assert answers == {number: (7, "count", (number,)) for number in range(4)}
    assert time.monotonic() - begin < 1


def test_slow_part_that_lives_is_waited_for():
    assert set(ask(Handle(), Handle(0.7))) == {0, 1}


def test_silent_parts_are_lost_soon_and_others_are_not():
    begin, others = time.monotonic(), set(threading.enumerate())
    with pytest.raises(LostError) as raised:
        ask(Handle(None, None), Handle(), Handle(None, None), Handle(0.3))
    assert raised.value.numbers == {0, 2}
    assert time.monotonic() - begin < 1
    left = {one.name for one in threading.enumerate() if one not in others}
    assert not [name for name in left if name.startswith("ThreadPoolExecutor")]


def test_part_that_never_ends_is_lost_in_the_end(monkeypatch):
    monkeypatch.setattr(sharded, "WAIT_SECONDS", 0.3)
    with pytest.raises(LostError):
        ask(Handle(None, 0.0))


def test_error_of_a_part_is_raised_as_it_is():
    error = exceptions.RayTaskError("ask", "traceback", InputError("the index is corrupted"))
    with pytest.raises(InputError, match=r"^the index is corrupted$"):
        ask(Handle(), Handle(error=error))


def test_answers_say_how_many_parts_are_missing():
    answer = Answer([], {}, 3)
    assert sharded._mark(answer, 2).missing == 2
    assert [one.missing for one in sharded._mark([answer, answer], 1)] == [1, 1]
    assert sharded._mark("a film", 1) == "a film"
