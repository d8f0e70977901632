"""Tests of malformed checkpoints: no execution of code in files, bounded memory."""

import io
import os
import pickle
import pickletools
import struct
import subprocess
import tracemalloc

import numpy as np
import pytest
from pickles import (
    BYTES,
    LEGACY,
    PLAIN,
    SCRIPT,
    assert_refused,
    entries_of,
    legacy,
    limit_processor_time,
    program,
    push,
    push_dict,
    push_global,
    push_module,
    push_storage,
    push_tensor,
    write_program,
    write_zip,
)

from xclip_jax.cli import InputError
from xclip_jax.convert.torch_archive import Archive, read_archive

__all__ = ["limit_processor_time"]  # the fixture

HUGE = (1 << 62) // 3
TUPLES = b")" + b"\x85" * 100_000
TENSORS = {
    "reaches beyond": push_tensor(stride=(2,)),
    "starts beyond": push_tensor(offset=1),
    "expanded": push_tensor(size=(HUGE,), stride=(0,)),
    "expanded twice": push_tensor(size=(3, 4), stride=(0, 0)),
    "huge": push_tensor(numel=HUGE, size=(HUGE,)),
    "huge and empty": push_tensor(size=(0, 1 << 63), stride=(1, 1)),
    "negative size": push_tensor(size=(-1,)),
    "negative stride": push_tensor(offset=5, stride=(-1,)),
    "negative offset": push_tensor(offset=-1, size=(2,)),
    "negative storage": push_tensor(numel=-1),
    "half a size": push_tensor(size=(0.5,)),
    "two strides": push_tensor(stride=(1, 1)),
    "many axes": push_tensor(size=(1,) * 33, stride=(1,) * 33),
    "unknown type": push_tensor(kind="QInt8Storage"),
    "negated view": push_tensor().replace(b")RtR", b")R" + push({"neg": True}) + b"tR"),
    "no storage": push_tensor().replace(push_storage(), push("0")),
    "storage of two types": push_tensor() + b"0" + push_tensor(numel=3, kind="LongStorage"),
    "view of a storage": push_tensor(more=push(("1", 0, 6))),
    "key of a storage": push_tensor().replace(push("0"), TUPLES),
}
PLAINS = {
    "nothing": b"",
    "cut": PLAIN[:-1],
    "nothing pushed": b".",
    "list": program(b"]"),
    "no tensors": program(b"}"),
    "not a tensor": program(push_dict({"model": push_dict({"a": push_tensor()})})),
    "numbered tensor": program(push_dict({1: push_tensor()})),
    "huge memo index": program(b"Nr\xff\xff\xff\xff"),
    "huge bytearray": program(b"\x96" + struct.pack("<Q", 1 << 30)),
    "huge frame": program(b"\x95" + struct.pack("<Q", 1 << 62)),
    "huge string": program(b"X\xff\xff\xff\xff"),
    "marks": b"(" * 100_000,
    "nested lists": program(b"]" * 100_000 + b"a" * 99_999),
    "nested tuples": program(TUPLES),
    "nested tuples for a key": program(b"}" + TUPLES + b"Ns"),
    "2^99 tuples for a key": program(b"})" + b"q\0h\0\x86" * 99 + b"Ns"),
    "keys of one hash": program(
        b"}" + b"".join(push((n << 61) - n, 0) + b"s" for n in range(1, 100_000))
    ),
    "dict in itself": program(b"}q\xff" + push("state_dict") + b"h\xffs"),
    "state of a function": program(
        push_global("collections", "OrderedDict") + b"N" + push({"__doc__": ""}) + b"\x86b"
    ),
    "call of a string": program(push("os.system", "true") + b"\x85R"),
    "dict of a pair of tuples": program(
        push_global("collections", "OrderedDict") + b"]" + TUPLES + b"N\x86a\x85R"
    ),
    "attribute of a class": program(
        push_global("collections", "OrderedDict") + b"N" + push({"get": 1}) + b"\x86b"
    ),
    "attribute of a call": program(
        push_global("torch._utils", "_rebuild_tensor") + push_dict({"name": push("os")}) + b"b"
    ),
    "state of a storage type": program(
        push_global("torch", "FloatStorage") + push((3, ">", None, None, None, 4, 4, 0)) + b"b"
    ),
    "attribute of a tensor": program(push_tensor() + push_dict({"offset": push(9)}) + b"b"),
    "item of a class": program(push_global("collections", "OrderedDict") + push("a", 1) + b"s"),
    "object of a storage type": program(push_global("torch", "FloatStorage") + b")\x81"),
    "extension": program(b"\x82\1"),
    "protocol 0": pickle.dumps({"a": 1}, 0),
}
SCRIPTS = {
    "attribute of a module class": program(
        push_global("__torch__", "M") + b"N" + push({"update": 1}) + b"\x86b"
    ),
    "module of a pair of tuples": program(
        push_global("__torch__", "M") + b"]" + TUPLES + b"N\x86a\x85R"
    ),
    "circle": program(push_module({}) + b"q\xff}" + push("a") + b"h\xffsb"),
    "nameless circle": program(push_module({}) + b"q\xff}" + push("") + b"h\xffsb"),
    "2^99 modules": program(
        push_module({}) + (b"q\xff" + push_module({"a": b"h\xff", "b": b"h\xff"})) * 99
    ),
    "deep": program(
        (push_global("__torch__", "M") + b")\x81}" + push("a")) * 9999 + b"N" + b"sb" * 9999
    ),
    "numbered attribute": program(push_module({1: push_tensor()})),
    "no module": program(push_dict({"a": push_tensor()})),
    "class called": program(push_global("__torch__", "M") + b")R"),
    "state of a list": program(push_global("__torch__", "M") + b")\x81" + push([1]) + b"b"),
}


@pytest.mark.parametrize("case", TENSORS | PLAINS | SCRIPTS)
def test_malformed_pickles_are_errors_in_bounded_memory(tmp_path, case):
    data = program(push_dict({"a": TENSORS[case]})) if case in TENSORS else (PLAINS | SCRIPTS)[case]
    path = write_program(tmp_path / "m.pt", data, script=case in SCRIPTS)
    tracemalloc.start()
    try:
        assert_refused(path)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


class Call:
    """An object whose pickle calls `function`."""

    def __init__(self, function, argument):
        self.reduced = (function, (argument,))

    def __reduce__(self):
        return self.reduced


def attacks(marker):
    """Returns [(name of a global, a program that calls it to create the file `marker`)]."""
    found = []
    touch, create = f"touch '{marker}'", f"open({str(marker)!r}, 'w').close()"
    for module, function, argument in (
        ("os", "system", touch),
        ("subprocess", "getoutput", touch),
        ("builtins", "eval", create),
        ("builtins", "exec", create),
    ):
        named, argument = push_global(module, function), push(argument)
        call = named + argument + b"\x85R"
        pushed = (
            call,
            push(module, function) + b"\x93" + argument + b"\x85R",  # STACK_GLOBAL
            b"(" + argument + f"i{module}\n{function}\n".encode(),  # INST
            b"(" + named + argument + b"o",  # OBJ
            call + b"0}",  # with its result discarded
            push_dict({"state_dict": push_dict({"a": push_tensor()}), "optimizer": call}),
            push_tensor().replace(b")RtR", b")R" + call + b"tR"),  # as an argument of a tensor
        )
        found += [(f"{module}.{function}", program(each)) for each in pushed]
    system, touch = push_global("os", "system"), push(touch)
    partial = push_global("functools", "partial") + system + touch + b"\x86\x81)R"  # NEWOBJ
    setter = push_global("types", "SimpleNamespace") + b")R" + push_dict({"__setstate__": system})
    found += [("functools.partial", program(partial))]
    found += [("types.SimpleNamespace", program(setter + b"b" + touch + b"b"))]  # BUILD
    calls = Call(os.system, f"touch '{marker}'"), Call(subprocess.getoutput, "true")
    return found + [("posix.system", pickle.dumps(calls, protocol)) for protocol in range(2, 5)]


class UnsafeUnpickler(pickle.Unpickler):
    """An unpickler that executes every call except those of torch."""

    def persistent_load(self, pid):
        return pid

    def find_class(self, module, name):
        return (lambda *_: None) if module[:5] == "torch" else super().find_class(module, name)


def test_attacks_succeed_with_plain_pickle(tmp_path):
    for name, data in attacks(tmp_path / "ran"):
        UnsafeUnpickler(io.BytesIO(data)).load()
        assert (tmp_path / "ran").exists(), (name, data)
        (tmp_path / "ran").unlink()


def test_attacks_are_reported_and_not_executed(tmp_path):
    path, marker = tmp_path / "x.pt", tmp_path / "ran"
    for name, data in attacks(marker):
        message = f"has a pickle that refers to {name!r}"
        for script in (False, True):
            assert_refused(write_program(path, data, script), message)
        for content in (data, legacy(data), legacy(LEGACY, keys=data)):
            path.write_bytes(content)
            assert_refused(path, message)
        assert not marker.exists()


def flip_bits(rng, data):
    data = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 9)):
        data[place] ^= 1 << rng.integers(8)
    return bytes(data)


def read_or_error(path):
    try:
        return read_archive(path)
    except InputError as error:
        return error


def write_corrupted(rng, how, path, attack):
    """Writes a corrupted checkpoint, returns the type of the outcome, None if both may occur."""
    data, script = [(PLAIN, False), (SCRIPT, True)][rng.integers(2)]
    entries = entries_of(data, script)
    if how == "pickle flipped":
        write_zip(path, entries | {"a/data.pkl": flip_bits(rng, data)})
    elif how == "pickle shuffled":
        start, end, place = rng.integers(len(data), size=3)
        write_zip(path, entries | {"a/data.pkl": data[:place] + data[start:end] + data[place:]})
    elif how == "attack inserted":
        places = [place for _, _, place in pickletools.genops(data)]
        place = places[rng.integers(len(places))]
        write_zip(path, entries | {"a/data.pkl": data[:place] + attack[2:-1] + data[place:]})
        return InputError
    elif how == "weights flipped":
        write_zip(path, entries | {"a/data/0": flip_bits(rng, BYTES)})
        return Archive
    elif how == "entries swapped":
        one, other = rng.choice(list(entries), 2, replace=False)
        write_zip(path, entries | {one: entries[other], other: entries[one]})
    else:
        content = legacy(LEGACY) if rng.integers(2) else write_zip(path, entries).read_bytes()
        cut = content[: rng.integers(len(content))]
        path.write_bytes(cut if how == "file cut" else flip_bits(rng, content))
        return InputError if how == "file cut" else None
    return None


@pytest.mark.parametrize(
    "how",
    [
        "file flipped",
        "file cut",
        "entries swapped",
        "pickle flipped",
        "pickle shuffled",
        "weights flipped",
        "attack inserted",
    ],
)
def test_corrupted_checkpoints_are_read_or_errors(tmp_path, how):
    path, marker = tmp_path / "m.pt", tmp_path / "ran"
    programs = [data for _, data in attacks(marker)]
    rng = np.random.default_rng(0)
    for number in range(100):
        expected = write_corrupted(rng, how, path, programs[number % len(programs)])
        found = read_or_error(path)
        assert isinstance(found, expected or object), (number, found)
        if isinstance(found, Archive):
            size = sum(len(array.tobytes()) for array in found.tensors.values())
            assert 0 < size <= path.stat().st_size
        else:
            assert str(found).startswith(f"{path}: ")
    assert not marker.exists()
