"""Tests of reading PyTorch checkpoints: bit-identical tensors, errors about other files."""

import collections
import os
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoints import assert_same
from pickles import (
    BYTES,
    LEGACY,
    PLAIN,
    WEIGHTS,
    assert_refused,
    entries_of,
    legacy,
    limit_processor_time,
    program,
    push,
    push_dict,
    push_global,
    push_module,
    push_tensor,
    write_program,
    write_zip,
)

from xclip_jax.cli import InputError
from xclip_jax.convert import torch_archive
from xclip_jax.convert.torch_archive import DTYPES, read_archive, write_archive

__all__ = ["limit_processor_time"]  # the fixture

TESTS = Path(__file__).resolve().parent
GOLDENS = TESTS / "data" / "goldens_small", TESTS.parents[1] / "shared" / "goldens"
FILES = sorted(p for folder in GOLDENS for p in folder.glob("*") if p.suffix in (".bin", ".pt"))
STATE = {
    "logit_scale": np.array(4.6, np.float32),
    "input_resolution": np.array(224),
    "größe.weight": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "empty": np.zeros((0, 3), np.float32),
    "many": np.arange(70000),
    "nan and -0": np.frombuffer(b"\1\0\x80\x7f\0\0\0\x80", np.float32),
}


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
    assert_same(archive.tensors, {"module.a": WEIGHTS})
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
    assert_same(read_archive(tmp_path / "x.pt").tensors, to_numpy(torch, wrapped.state_dict()))


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
