"""Tests of reading PyTorch checkpoints: bit-identical tensors, no execution of code in files."""

import collections
import io
import os
import pickle
import pickletools
import re
import signal
import struct
import subprocess
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from xclip_jax.cli import InputError
from xclip_jax.convert import torch_archive
from xclip_jax.convert.torch_archive import DTYPES, Archive, read_archive, write_archive

TESTS = Path(__file__).resolve().parent
GOLDENS = TESTS / "data" / "goldens_small", TESTS.parents[1] / "shared" / "goldens"
FILES = sorted(p for folder in GOLDENS for p in folder.glob("*") if p.suffix in (".bin", ".pt"))
WEIGHTS = np.arange(6, dtype=np.float32)
BYTES = WEIGHTS.tobytes()


@pytest.fixture(autouse=True)
def _limit_processor_time():
    def fail(*_):
        pytest.fail("takes too long")  # not an Exception: the reader does not catch it

    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, 20)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


# Handmade checkpoints. `pushed` are pickle instructions that push one object; `program` is a
# complete pickle.


def push(*values):
    return b"".join(pickle.dumps(value, 2)[2:-1] for value in values)


def push_global(module, name):
    return f"c{module}\n{name}\n".encode()


def push_dict(items):
    pairs = (push(key) + value for key, value in items.items())
    return b"}(" + b"".join(pairs) + b"u"


def push_module(items):
    return push_global("__torch__.some_file", "Model") + b")\x81" + push_dict(items) + b"b"


def push_storage(key="0", numel=6, kind="FloatStorage", more=b""):
    return (
        b"(" + push("storage") + push_global("torch", kind) + push(key, "cpu", numel) + more + b"tQ"
    )


def push_tensor(offset=0, size=(6,), stride=(1,), **storage):
    function = push_global("torch._utils", "_rebuild_tensor_v2")
    hooks = push_global("collections", "OrderedDict") + b")R"
    return (
        function
        + b"("
        + push_storage(**storage)
        + push(offset, size, stride, False)
        + hooks
        + b"tR"
    )


def program(pushed):
    return b"\x80\2" + pushed + b"."


def entries_of(data_pkl, script=False):
    """Returns the entries of a zip checkpoint with two storages of six float32 numbers."""
    entries = {"a/data.pkl": data_pkl, "a/byteorder": b"little", "a/data/0": BYTES}
    return entries | {"a/data/1": BYTES[::-1]} | ({"a/constants.pkl": b""} if script else {})


def write_zip(path, entries, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def write_program(path, data_pkl, script=False):
    return write_zip(path, entries_of(data_pkl, script))


KEYS, STORED = program(push(["0"])), struct.pack("<q", 6) + BYTES


def legacy(root, keys=KEYS, data=STORED, little=True):
    """Returns a file of the legacy format, which is not a zip file; root, keys: programs."""
    heads = (torch_archive.LEGACY_MAGIC, 1001, {"little_endian": little})
    return b"".join(program(push(head)) for head in heads) + root + keys + data


PLAIN = program(
    push_dict({"a": push_tensor(), "b.c": push_tensor(key="1", size=(2, 3), stride=(3, 1))})
)
SCRIPT = program(push_module({"a": push_tensor(), "b": push_module({"c": push_tensor(key="1")})}))
LEGACY = program(push_dict({"a": push_tensor(size=(3, 2), stride=(1, 3), more=b"N")}))
STATE = {
    "logit_scale": np.array(4.6, np.float32),
    "input_resolution": np.array(224),
    "größe.weight": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "empty": np.zeros((0, 3), np.float32),
    "many": np.arange(70000),
    "nan and -0": np.frombuffer(b"\1\0\x80\x7f\0\0\0\x80", np.float32),
}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def assert_refused(path, message=": "):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_archive(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 300


def only_strings(value):
    return value if isinstance(value, str) else "of"


def test_written_tensors_are_read_bit_identically(tmp_path):
    state = STATE | {str(dtype): np.ones((2, 1), dtype) for dtype in DTYPES.values()}
    write_archive(tmp_path / "w.bin", state)
    archive = read_archive(tmp_path / "w.bin")
    assert_same(archive.tensors, state)
    assert list(archive.tensors) == list(state)
    assert (archive.torchscript, archive.nested) == (False, False)
    write_archive(tmp_path / "again.bin", archive.tensors)
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "w.bin").read_bytes()


def test_file_is_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "w.bin"
    write_archive(path, {"a": WEIGHTS})
    with pytest.raises(InputError, match="cannot store b: PyTorch has no type complex64"):
        write_archive(path, {"a": WEIGHTS, "b": np.zeros(2, np.complex64)})
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        write_archive(path, STATE)
    assert_same(read_archive(path).tensors, {"a": WEIGHTS})


def test_strided_and_shared_tensors_are_read(tmp_path):
    tensors = {
        "whole": push_tensor(size=(2, 3), stride=(3, 1)),
        "part": push_tensor(offset=1, size=(2, 2), stride=(3, 1)),
        "turned": push_tensor(size=(3, 2), stride=(1, 3)),
        "expanded": push_tensor(size=(1, 6), stride=(0, 1)),
    }
    found = read_archive(write_program(tmp_path / "s.pt", program(push_dict(tensors)))).tensors
    table = WEIGHTS.reshape(2, 3)
    expected = {"whole": table, "part": table[:, 1:], "turned": table.T, "expanded": WEIGHTS[None]}
    assert_same(found, expected)
    assert np.shares_memory(found["whole"], found["part"])


def test_only_weights_of_a_training_checkpoint_are_read(tmp_path):
    state = {"module.a": push_tensor(), "module.n": push(3)}
    unread = {"exp_avg": push_tensor(key="9", numel=1 << 40, size=(1 << 40,))}
    items = {"epoch": push(3), "state_dict": push_dict(state), "optimizer": push_dict(unread)}
    archive = read_archive(write_program(tmp_path / "t.pt", program(push_dict(items))))
    assert_same(archive.tensors, {"a": WEIGHTS})
    assert (archive.torchscript, archive.nested) == (False, True)


def test_prefix_of_only_some_names_is_kept(tmp_path):
    items = {"module.a": push_tensor(), "b": push_tensor()}
    archive = read_archive(write_program(tmp_path / "p.pt", program(push_dict(items))))
    assert list(archive.tensors) == ["module.a", "b"]


def test_torchscript_modules_are_read_recursively(tmp_path):
    pads = push_global("torch.jit._pickle", "build_intlist") + push([1, 2]) + b"\x85R"
    weight = push_tensor(size=(2, 3), stride=(3, 1))
    layers = push_module({"0": push_module({"weight": weight, "training": push(True)})})
    size = push_tensor(size=(), stride=(), numel=3, kind="LongStorage", key="1")
    items = {"scale": push(1.5), "size": size, "layers": layers, "pads": pads}
    root = push_module(items | {"state_dict": push_module({})})
    archive = read_archive(write_program(tmp_path / "j.pt", program(root), script=True))
    size = np.frombuffer(BYTES[::-1], np.int64)[0].reshape(())
    assert_same(archive.tensors, {"size": size, "layers.0.weight": WEIGHTS.reshape(2, 3)})
    assert (archive.torchscript, archive.nested) == (True, False)
    path = write_program(tmp_path / "n.pt", program(root))
    assert_refused(path, "has a pickle that refers to '__torch__.some_file.Model'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (legacy(LEGACY, data=struct.pack("<q", 6) + BYTES[:-1]), "is truncated"),
        (legacy(LEGACY, data=struct.pack("<q", 5) + BYTES), "whose size does not match"),
        (legacy(LEGACY, little=False), "is not little-endian"),
        (legacy(LEGACY, keys=program(b"]")), "KeyError '0'"),
        (legacy(LEGACY, keys=program(push(["1"]))), "KeyError '1'"),
        (legacy(LEGACY, keys=program(b"])" + b"\x85" * 100_000 + b"a")), "malformed list"),
        (program(push({"a": 1})), "is a pickle, but not a PyTorch checkpoint"),
    ],
    ids=only_strings,
)
def test_legacy_format_is_read_and_its_errors_reported(tmp_path, content, message):
    path = tmp_path / "l.pt"
    path.write_bytes(legacy(LEGACY))
    assert_same(read_archive(path).tensors, {"a": WEIGHTS.reshape(2, 3).T})
    path.write_bytes(content)
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"epoch,loss\n1,0.5\n", "is not a PyTorch checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "is not a PyTorch checkpoint"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32"', "is a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
        (b"PK\3\4", "File is not a zip file"),
        (b"\x80", "is corrupted"),
    ],
    ids=only_strings,
)
def test_error_names_the_type_of_other_files(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    assert_refused(tmp_path / "x.pt", message)


def test_folder_or_missing_file_is_an_error(tmp_path):
    assert_refused(tmp_path, "is not a file")
    with pytest.raises(FileNotFoundError):
        read_archive(tmp_path / "missing.pt")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"readme": b""}, "must hold one */data.pkl"),
        (entries_of(PLAIN) | {"b/data.pkl": PLAIN}, "must hold one */data.pkl"),
        (entries_of(PLAIN) | {"a/byteorder": b"big"}, "is not little-endian"),
        ({"a/data.pkl": PLAIN}, "lacks the entry 'data/0'"),
        (entries_of(PLAIN) | {"a/data/0": BYTES[:-1]}, "storage '0' whose size does not match"),
        (entries_of(PLAIN) | {"a/data/0": BYTES + b"\0"}, "storage '0' whose size does not match"),
        (entries_of(PLAIN + bytes(9 << 20)), "a pickle of more than 8388608 bytes"),
        ({f"{n:099}": b"" for n in range(99)}, "has a zip directory of more than"),
    ],
    ids=only_strings,
)
def test_zip_files_of_other_layouts_are_errors(tmp_path, monkeypatch, entries, message):
    monkeypatch.setattr(torch_archive, "MAX_DIRECTORY", 9999)
    assert_refused(write_zip(tmp_path / "z.pt", entries), message)


def test_compressed_or_overlapping_zip_entries_are_errors(tmp_path):
    path = write_zip(tmp_path / "c.pt", entries_of(PLAIN), compression=zipfile.ZIP_DEFLATED)
    assert_refused(path, "has a compressed entry 'byteorder', must be uncompressed")
    path = write_zip(tmp_path / "o.pt", entries_of(PLAIN))
    data = bytearray(path.read_bytes())
    for header in re.finditer(b"PK\1\2", data):  # declares sizes that reach into the next entries
        data[header.start() + 20 : header.start() + 28] = struct.pack("<2I", 400, 400)
    path.write_bytes(data)
    assert_refused(path, "has entries that overlap")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_repeated_zip_entry_is_an_error(tmp_path):
    with zipfile.ZipFile(write_program(tmp_path / "d.pt", PLAIN), "a") as archive:
        archive.writestr("a/data.pkl", PLAIN)
    assert_refused(tmp_path / "d.pt", "has two entries with the same name")


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
    """Unpickler that executes every call except those of torch."""

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


# Comparisons with PyTorch, where it is installed.


def to_numpy(torch, state):
    bits = {torch.bfloat16: (torch.int16, DTYPES["torch.BFloat16Storage"])}
    arrays = {}
    for name, value in state.items():
        like, dtype = bits.get(value.dtype, (value.dtype, None))
        array = value.detach().view(like).numpy()
        arrays[name] = array.view(dtype) if dtype else array
    return arrays


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_files_saved_by_torch_are_read(tmp_path, options):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = collections.OrderedDict(base=base, turned=base.permute(2, 0, 1), part=base[:, 1:, ::2])
    state |= {"parameter": torch.nn.Parameter(base * 2), "half": base.half(), "empty": base[:0].mT}
    state |= {
        "end": base.flatten()[24:],
        "bfloat16": base.bfloat16(),
        "size": torch.tensor(224),
        "flag": torch.tensor([True]),
    }
    state |= {"expanded": torch.arange(77).expand(1, -1), "bytes": torch.ones(3, dtype=torch.uint8)}
    expected = to_numpy(torch, state)
    training = {"epoch": 3, "name": "x", "state_dict": state, "optimizer": {"state": {0: base}}}
    for saved in (state, dict(state), training):
        torch.save(saved, tmp_path / "x.pt", **options)
        archive = read_archive(tmp_path / "x.pt")
        assert_same(archive.tensors, expected)
        assert (archive.torchscript, archive.nested) == (False, saved is training)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_state_dicts_saved_by_torch_are_read(tmp_path, options):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    wrapped = torch.nn.Module()
    wrapped.module = model
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    saved = {"state_dict": wrapped.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "x.pt", **options)
    assert_same(read_archive(tmp_path / "x.pt").tensors, to_numpy(torch, model.state_dict()))


@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_torchscript_saved_by_torch_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).half()
    model.register_buffer("input_resolution", torch.tensor(224))
    traced = torch.jit.trace(model.float(), torch.ones(1, 3, 4, 4), check_trace=False)
    for script in (torch.jit.script(model), traced):
        torch.jit.save(script, tmp_path / "x.pt")
        archive = read_archive(tmp_path / "x.pt")
        assert archive.torchscript
        assert_same(archive.tensors, to_numpy(torch, script.state_dict()))


def test_torch_loads_written_files(tmp_path):
    torch = pytest.importorskip("torch")
    write_archive(tmp_path / "w.bin", STATE)
    for options in ({}, {"mmap": True}):
        state = torch.load(tmp_path / "w.bin", weights_only=True, **options)
        assert type(state) is collections.OrderedDict
        assert_same(to_numpy(torch, state), STATE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_reference_checkpoints_survive_a_round_trip(tmp_path, path):
    archive = read_archive(path)
    assert archive.torchscript == (path.suffix == ".pt")
    prefix = "" if archive.torchscript else "clip."
    attention = f"{prefix}visual.transformer.resblocks.0.attn.in_proj_weight"
    assert archive.tensors[attention].shape[0] == 3 * archive.tensors[attention].shape[1]
    if archive.torchscript:
        size = archive.tensors["input_resolution"]
        assert (size.shape, size.dtype) == ((), np.int64)
    write_archive(tmp_path / "w.bin", archive.tensors)
    assert_same(read_archive(tmp_path / "w.bin").tensors, archive.tensors)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_reference_checkpoints_match_torch(path):
    torch = pytest.importorskip("torch")
    archive = read_archive(path)
    if archive.torchscript:
        state = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        state = torch.load(path, weights_only=True)
    assert_same(archive.tensors, to_numpy(torch, state))
