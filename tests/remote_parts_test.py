"""Tests of how the front end waits for parts, with stand-ins for Ray's handles."""

import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import tiny

from xclip_jax.cli import InputError
from xclip_jax.search import Index, sharded
from xclip_jax.search.readable import UnreadableError
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


def test_wrong_model_is_an_error_before_shards_start(tmp_path):
    tiny.make_model(tmp_path / "model")
    tiny.make_model(tmp_path / "other", seed=1)
    store = Index.create(tmp_path / "index", tmp_path / "model")._store
    for name, message in (("nowhere", "no model in"), ("other", "different models")):
        with pytest.raises(InputError, match=message):
            sharded.ShardedIndex(store, lambda: pytest.fail("started"), model=tmp_path / name)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(InputError, match="is no longer in"):
        sharded.ShardedIndex(store, lambda: pytest.fail("started"))


class Serve:
    """Ray Serve whose applications have deployments with messages. It remembers what it deletes."""

    def __init__(self, **messages):
        self.messages, self.deleted = messages, []

    def status(self):
        applications = {
            name: SimpleNamespace(deployments={name: SimpleNamespace(message=text)})
            for name, text in self.messages.items()
        }
        return SimpleNamespace(applications=applications)

    def delete(self, name, **_):
        self.deleted.append(name)


@pytest.mark.parametrize("kind", [InputError, UnreadableError])
def test_reason_of_a_shard_that_cannot_start_is_its_last_line(kind):
    lines = ["Error:", "Traceback (most recent call last):", '  File "a.py"']
    lines.append(f"{kind.__module__}.{kind.__name__}: it is another model")
    served = Serve(a="", b="\n".join(lines))
    assert sharded._find_reason(served, ["a", "b"]) == "it is another model"
    assert sharded._find_reason(served, ["a"]) == ""


def test_only_shards_without_a_living_front_end_are_deleted(monkeypatch):
    monkeypatch.setattr(sharded, "ORPHAN_SECONDS", 0.01)
    living, ended, lost = (f"xclip_jax-{digit * 32}" for digit in "abc")
    calls = []

    def get_actor(name, namespace):
        calls.append(name)
        # Ray notices after some time that the machine of an actor is lost.
        if name == ended or (name == lost and calls.count(lost) > 3):
            raise ValueError(name)

    names = [f"{living}-0", f"{ended}-0", f"{ended}-12", f"{lost}-1", "others-0"]
    served, ray = Serve(**dict.fromkeys(names, "")), SimpleNamespace(get_actor=get_actor)
    with sharded._deleting_orphans(ray, served):
        deadline = time.monotonic() + 10
        while f"{lost}-1" not in served.deleted and time.monotonic() < deadline:
            time.sleep(0.01)
    assert set(served.deleted) == {f"{ended}-0", f"{ended}-12", f"{lost}-1"}
    served.deleted.clear()
    time.sleep(0.1)
    assert served.deleted == []  # it has ended


def test_missing_cpus_are_reported(capsys):
    actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: "handle"))
    for free, expected in ((1.0, "waiting: 2 shards need a CPU each, 1 are free\n"), (2.0, "")):
        resources = lambda free=free: {"CPU": free}  # noqa: E731
        ray = SimpleNamespace(remote=lambda kind: actor, available_resources=resources)
        assert sharded._mark_alive(ray, "xclip_jax-a", 2) == "handle"
        assert capsys.readouterr().err == expected
