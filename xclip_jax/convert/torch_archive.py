"""Reads PyTorch checkpoint files without PyTorch.

A checkpoint is a pickle beside raw storages, and a pickle is a program. Before it is loaded, each
of its instructions is checked against a list. Loading then imports nothing: each global name is
replaced by a class of this module or an inert value, or is refused.
"""

import functools
import io
import itertools
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from xclip_jax.cli import InputError

DTYPES = {
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
REBUILD = {f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter")}
# The instructions that torch.save (protocols 2 and 4) and TorchScript write.
OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_TUPLE
    TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT
    MEMOIZE BINPERSID GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
"""
# A large model's pickle has less than 1 MiB; each byte can make over a hundred bytes of objects.
MAX_PICKLE = 8 << 20
MAX_DIRECTORY = 16 << 20  # bytes that list the entries of a zip file
MAX_VISITS, MAX_NAME = 100_000, 1000  # limits on walking through TorchScript modules
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass
class Archive:
    """The contents of a checkpoint file.

    Attributes:
        tensors: {name: array}, read-only, with the strides and shared memory of the saved tensors.
        torchscript: True for a TorchScript archive, such as OpenAI's CLIP.
        nested: True if the weights were under the key `state_dict` of a training checkpoint.
    """

    tensors: dict[str, np.ndarray]
    torchscript: bool
    nested: bool


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _Tensor(NamedTuple):
    """A tensor that is not yet read or checked, so that optimizer state can be skipped."""

    storage: _Storage
    offset: Any
    size: tuple
    stride: tuple


class _Dict(dict):
    """A dict or OrderedDict."""

    __slots__ = ()

    def __init__(self) -> None:  # dict's own would hash any key
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        # Hashing nested tuples can crash the interpreter or never end, and large ints can collide.
        if type(key) is not str and not (type(key) is int and 0 <= key < 1 << 60):
            raise InputError("has a pickle with keys that are not strings or small integers")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        """Ignores the state, which is the _metadata that PyTorch attaches to a state dict."""


class _Module(_Dict):
    """The attributes of a TorchScript module."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, _Dict):
            raise InputError("has a pickle with a malformed object")
        self.update(state)


class _Call:
    """A stand-in for a function named in a pickle, which returns a _Tensor or None."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> _Tensor | None:
        match self.name, args:
            case (
                "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
                (_Storage() as storage, offset, tuple(size), tuple(stride), *rest),
            ) if not any(rest[2:]):  # metadata: a conjugate or negative view
                return _Tensor(storage, offset, size, stride)
            case "torch._utils._rebuild_parameter", (_Tensor() as tensor, *_):
                return tensor
            case str(name), _ if name.startswith("torch.jit._pickle."):
                return None  # lists of numbers
        raise InputError("has a pickle with a malformed call")

    def __setstate__(self, state: Any) -> None:
        raise InputError("has a pickle with a malformed object")


class _Unpickler(pickle.Unpickler):
    """Builds plain values, _Dict, _Tensor and _Module from the next pickle of a stream."""

    def __init__(self, stream: io.BytesIO, torchscript: bool = False) -> None:
        self.torchscript = torchscript
        self.storages: dict[str, _Storage] = {}
        super().__init__(io.BytesIO(self._check(stream)), encoding="utf-8")

    def _check(self, stream: io.BytesIO) -> bytes:
        """Checks the instructions and returns them, with dicts replaced by OrderedDict calls.

        The loader would hash any key of a plain dict; `_Dict` checks keys first.
        """
        data, program, allowed = stream.getvalue(), bytearray(), set(OPCODES.split())
        for code, arg, place in pickletools.genops(stream):
            if code.name in {"GLOBAL", "INST"}:
                self.find_class(*str(arg).split(" ", 1))
            huge = code.name == "LONG_BINPUT" and int(arg or 0) > len(data)  # the memo is an array
            if code.name not in allowed or huge:
                raise InputError("has a pickle with instructions that are not allowed")
            if code.name == "EMPTY_DICT":
                program += b"ccollections\nOrderedDict\n)R"
            elif code.name != "FRAME":
                program += data[place : stream.tell()]
        return bytes(program)

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in for a global name, never a function or class of another module."""
        name = f"{module}.{name}".replace("torch.cuda.", "torch.")
        if name in DTYPES:
            return name  # not a dtype, whose state a pickle could set
        if name == "collections.OrderedDict":
            return _Dict
        if name.startswith("__torch__.") and self.torchscript:
            return _Module
        if name in REBUILD or (name.startswith("torch.jit._pickle.") and self.torchscript):
            return _Call(name)
        raise InputError(
            f"has a pickle that refers to {name!r:.99}: only plain tensors are allowed"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case "storage", str(kind), str(key), _, int(numel), *views if not any(views):
                storage = _Storage(key, DTYPES[kind], numel)
                if numel >= 0 and self.storages.setdefault(key, storage) == storage:
                    return storage
        raise InputError("has a pickle with a malformed storage")


class _BoundedFile(io.BufferedReader):
    """A file that refuses reads of more than `limit` bytes, once `limit` is set."""

    limit: int | None = None

    def read(self, size: int | None = -1) -> bytes:
        if self.limit is None:
            return super().read(size)
        wanted = self.limit + 1 if size is None or size < 0 else min(size, self.limit + 1)
        data = super().read(wanted)
        if len(data) > self.limit:
            raise InputError(f"has a zip directory of more than {self.limit} bytes")
        return data


def read_archive(path: str | os.PathLike) -> Archive:
    """Reads a file written by torch.save, in the new or the legacy format, or by torch.jit.save.

    Raises:
        InputError: the file is of another kind, is corrupted or refers to anything but tensors;
            the message names the file.
        OSError: the file is missing or cannot be opened.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a file")
    with _BoundedFile(io.FileIO(path)) as file:
        head = file.read(64)
        file.seek(0)
        try:
            if head.startswith(b"PK\3\4"):
                return _read_zip(file)
            if head.startswith(b"\x80"):  # a pickle
                return _read_legacy(file)
            raise InputError(_describe_other_file(head))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (
            Exception
        ) as error:  # zipfile, pickle and NumPy raise a dozen types on corrupted data
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            raise InputError(
                f"{path}: is corrupted or not a PyTorch checkpoint ({reason})"
            ) from None


def _describe_other_file(head: bytes) -> str:
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights themselves: fetch them with `git lfs pull`"
    if head[8:10] == b'{"':
        return "is a safetensors file, not a PyTorch checkpoint: its name must end in .safetensors"
    return "is not a PyTorch checkpoint (a file of torch.save or torch.jit.save)"


def _read_zip(file: _BoundedFile) -> Archive:
    file.limit = MAX_DIRECTORY  # ZipFile reads the whole directory and makes an object per entry
    with zipfile.ZipFile(file) as archive:
        file.limit = None
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise InputError("has two entries with the same name")
        if sum(entry.compress_size for entry in entries.values()) > os.fstat(file.fileno()).st_size:
            raise InputError("has entries that overlap")
        roots = [name.split("/")[0] for name in entries if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise InputError(
                "is a zip file, but not a PyTorch checkpoint: must hold one */data.pkl"
            )

        def read(name: str) -> bytes:
            entry = entries.get(f"{roots[0]}/{name}")
            if entry is None:
                raise InputError(f"lacks the entry {name!r:.99}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise InputError(f"has a compressed entry {name!r:.99}, must be uncompressed")
            if name == "data.pkl" and entry.file_size > MAX_PICKLE:
                raise InputError(f"has a pickle of more than {MAX_PICKLE} bytes")
            return archive.read(entry)  # checks the CRC

        if f"{roots[0]}/byteorder" in entries and read("byteorder") != b"little":
            raise InputError("is not little-endian")
        parts = {name.split("/")[1] for name in entries if name.startswith(f"{roots[0]}/")}
        torchscript = bool(parts & {"constants.pkl", "code"})
        root = _Unpickler(io.BytesIO(read("data.pkl")), torchscript).load()
        return _archive(root, torchscript, lambda key: read(f"data/{key}"))


def _read_legacy(file: BinaryIO) -> Archive:
    """Reads the format before PyTorch 1.6: five pickles, then each storage's length and bytes."""
    stream = io.BytesIO(file.read(MAX_PICKLE))
    if _Unpickler(stream).load() != LEGACY_MAGIC:
        raise InputError("is a pickle, but not a PyTorch checkpoint")
    _, system = _Unpickler(stream).load(), _Unpickler(stream).load()
    if not isinstance(system, _Dict) or system.get("little_endian") is not True:
        raise InputError("is not little-endian")
    unpickler = _Unpickler(stream)
    root, keys = unpickler.load(), _Unpickler(stream).load()
    place, places = stream.tell(), {}
    for key in keys:
        if not isinstance(key, str):
            raise InputError("has a malformed list of storages")
        storage = unpickler.storages[key]
        places[key] = place + 8
        place += 8 + storage.nbytes
    if place > os.fstat(file.fileno()).st_size:
        raise InputError("is truncated")

    def read(key: str) -> bytes:
        file.seek(places[key] - 8)
        if int.from_bytes(file.read(8), "little") != unpickler.storages[key].numel:
            raise InputError(f"has a storage {key!r:.99} whose size does not match its tensors")
        return file.read(unpickler.storages[key].nbytes)

    return _archive(root, False, read)


def _archive(root: Any, torchscript: bool, read: Callable[[str], bytes]) -> Archive:
    """Returns the Archive of an unpickled file.

    `read` returns the bytes of the storage with a given key.
    """
    inner = root.get("state_dict") if isinstance(root, _Dict) else None
    nested = isinstance(inner, _Dict) and not torchscript
    unread = _module_tensors(root) if torchscript else _dict_tensors(inner if nested else root)
    if not unread:
        raise InputError("holds no tensors")
    prefix = "module." if all(name.startswith("module.") for name in unread) else ""
    read = functools.cache(read)
    tensors = {name.removeprefix(prefix): _array(tensor, read) for name, tensor in unread.items()}
    return Archive(tensors, torchscript, nested)


def _dict_tensors(root: Any) -> dict[str, _Tensor]:
    """Returns the tensors of a state dict, ignoring its numbers and other scalars."""
    if not isinstance(root, _Dict):
        raise InputError("holds no dict of tensors")
    for name, value in root.items():
        scalar = value is None or isinstance(value, bool | int | float | str)
        if not isinstance(name, str) or not (scalar or isinstance(value, _Tensor)):
            raise InputError(
                f"{name!r:.99} is not a tensor: must hold a dict of tensors, alone or under the "
                "key 'state_dict'"
            )
    return {name: value for name, value in root.items() if isinstance(value, _Tensor)}


def _module_tensors(root: Any) -> dict[str, _Tensor]:
    """Returns the tensors of a TorchScript module and its submodules, by dotted name."""
    if not isinstance(root, _Module):
        raise InputError("holds no TorchScript module")
    tensors, modules, visits = {}, [("", root)], itertools.count()
    for prefix, module in modules:  # grows during the loop
        for key, value in module.items():
            name = prefix + key
            if len(name) > MAX_NAME or next(visits) > MAX_VISITS:
                raise InputError("holds modules nested too deeply or in a cycle")
            if isinstance(value, _Tensor):
                tensors[name] = value
            elif isinstance(value, _Module):
                modules.append((name + ".", value))
    return tensors


def _array(tensor: _Tensor, read: Callable[[str], bytes]) -> np.ndarray:
    """Returns a read-only view of the storage's bytes, after checking that it lies within them."""
    storage, offset, size, stride = tensor
    numbers = all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
    if not numbers or len(size) != len(stride) or len(size) > 32:
        raise InputError("has a tensor of malformed shape")
    count = math.prod(size)
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if count > storage.numel or (count and end > storage.numel):
        raise InputError(f"has a tensor of shape {size!s:.99}, larger than its storage")
    data = read(storage.key)
    if len(data) != storage.nbytes:
        raise InputError(f"has a storage {storage.key!r:.99} whose size does not match its tensors")
    width = storage.dtype.itemsize
    return np.ndarray(size, storage.dtype, data, offset * width, [step * width for step in stride])
