"""Reads and writes PyTorch checkpoint files without PyTorch.

A checkpoint is a pickle beside raw storages, and a pickle is a program. Each of its instructions
is first checked against a list of allowed ones. Loading imports nothing: each allowed name stands
for a class of this module.
"""

import functools
import io
import itertools
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from xclip_jax.cli import InputError, atomic_file

# PyTorch's classes of storages and the types of their numbers.
_TYPES = {"Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64"}
_TYPES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
DTYPES = {f"torch.{k}Storage": jnp.dtype(v) for k, v in (_TYPES | {"Bool": "bool"}).items()}
_DICT, _MODULE, _SCRIPT_LIST = "collections.OrderedDict", "__torch__.", "torch.jit._pickle."
_REBUILD = [f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter")]
# The instructions that torch.save (protocols 2 and 4) and TorchScript write.
_ALLOWED = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING
    SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE
    BINPERSID GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
"""
# A large model's pickle has less than 1 MiB; each byte can make over a hundred bytes of objects.
MAX_PICKLE = 8 << 20
MAX_DIRECTORY = 16 << 20  # bytes that list the entries of a zip file
MAX_VISITS, MAX_NAME = 100_000, 1000  # limits on walking through TorchScript modules
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
Read = Callable[[str], bytes]  # the bytes of the storage with a given key


@dataclass
class Archive:
    """The contents of a checkpoint file."""

    tensors: dict[str, np.ndarray]  # read-only, with the strides and shared memory as saved
    torchscript: bool = False  # a TorchScript archive, such as OpenAI's CLIP
    nested: bool = False  # the weights were under the key `state_dict` of a training checkpoint


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _Object(dict):
    """An object of a pickle: the name and arguments of its constructor, and its items."""

    __match_args__ = ("name", "args")
    name, args = "", ()

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is str:  # others are not needed, and to hash them may take forever
            super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        if self.name == _MODULE:  # the state of a dict is its _metadata
            self.update(state if isinstance(state, _Object) else ())


_NAMES = (_DICT, _MODULE, _SCRIPT_LIST, *DTYPES, *_REBUILD)
_CLASSES = {name: type(name, (_Object,), {"name": name}) for name in _NAMES}


class _Unpickler(pickle.Unpickler):
    """Builds plain values, _Storage and _Object from the next pickle of a stream."""

    def __init__(self, stream: io.BytesIO, torchscript: bool = False) -> None:
        self.torchscript = torchscript
        self.storages: dict[str, _Storage] = {}
        super().__init__(io.BytesIO(self._check(stream)), encoding="utf-8")

    def _check(self, stream: io.BytesIO) -> bytes:
        """Checks the instructions and returns them, with each plain dict as an _Object."""
        data, program, allowed = stream.getvalue(), bytearray(), set(_ALLOWED.split())
        for code, arg, place in pickletools.genops(stream):
            if code.name in {"GLOBAL", "INST"}:
                self.find_class(*str(arg).split(" ", 1))
            huge = code.name == "LONG_BINPUT" and int(arg or 0) > len(data)  # the memo is an array
            if code.name not in allowed or huge:
                raise InputError(f"has a pickle with the instruction {code.name}: not allowed")
            if code.name == "EMPTY_DICT":
                program += b"ccollections\nOrderedDict\n)R"
            elif code.name != "FRAME":
                program += data[place : stream.tell()]
        return bytes(program)

    def find_class(self, module: str, name: str) -> type[_Object]:
        name = f"{module}.{name}".replace("torch.cuda.", "torch.")
        script = next((p for p in (_MODULE, _SCRIPT_LIST) if name.startswith(p)), None)
        if script and self.torchscript:
            return _CLASSES[script]
        if name in _CLASSES and not script:
            return _CLASSES[name]
        raise InputError(f"has a pickle that refers to {name!r:.99}: only tensors are allowed")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case "storage", type(name=str(kind)), str(key), _, int(numel), *views if not any(views):
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
        except Exception as error:  # zipfile, pickletools and NumPy raise a dozen types
            cause = " ".join(f"{type(error).__name__} {error}".split())[:200]
            why = f"is corrupted or not a PyTorch checkpoint ({cause})"
            raise InputError(f"{path}: {error if isinstance(error, InputError) else why}") from None


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
            raise InputError("is a zip file, but no PyTorch checkpoint: must hold one */data.pkl")

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
        torchscript = f"{roots[0]}/constants.pkl" in entries
        root = _Unpickler(io.BytesIO(read("data.pkl")), torchscript).load()
        return _archive(root, torchscript, lambda key: read(f"data/{key}"))


def _read_legacy(file: BinaryIO) -> Archive:
    """Reads the format before PyTorch 1.6: five pickles, then each storage's length and bytes."""
    stream = io.BytesIO(file.read(MAX_PICKLE))
    if _Unpickler(stream).load() != LEGACY_MAGIC:
        raise InputError("is a pickle, but not a PyTorch checkpoint")
    _, system = _Unpickler(stream).load(), _Unpickler(stream).load()
    if system.get("little_endian") is not True:
        raise InputError("is not little-endian")
    unpickler = _Unpickler(stream)
    root, keys, storages = unpickler.load(), _Unpickler(stream).load(), unpickler.storages
    place, places = stream.tell(), {}
    for key in keys:
        if not isinstance(key, str):
            raise InputError("has a malformed list of storages")
        places[key] = place
        place += 8 + storages[key].nbytes
    if place > os.fstat(file.fileno()).st_size:
        raise InputError("is truncated")

    def read(key: str) -> bytes:
        file.seek(places[key])
        if int.from_bytes(file.read(8), "little") != storages[key].numel:
            raise InputError(f"has a storage {key!r:.99} whose size does not match its tensors")
        return file.read(storages[key].nbytes)

    return _archive(root, False, read)


def _archive(root: Any, torchscript: bool, read: Read) -> Archive:
    """Returns the Archive of an unpickled file, whose storages are read by calling `read`."""
    if not (isinstance(root, _Object) and root.name.startswith(_MODULE if torchscript else _DICT)):
        raise InputError("holds no dict of tensors or TorchScript module")
    inner: Any = root.get("state_dict", root.get("weights"))
    nested = isinstance(inner, _Object) and not torchscript
    values = _module_tensors(root) if torchscript else (inner if nested else root)
    for name, value in values.items():
        if not isinstance(value, bool | int | float | str | None) and _tensor(value) is None:
            needed = "must hold a dict of tensors, alone or under the key 'state_dict'"
            raise InputError(f"{name!r:.99} is not a tensor: {needed}")
    unread = {name: tensor for name, value in values.items() if (tensor := _tensor(value))}
    if not unread:
        raise InputError("holds no tensors")
    read = functools.cache(read)
    tensors = {name: _array(read, *tensor) for name, tensor in unread.items()}
    return Archive(tensors, torchscript, nested)


def _module_tensors(root: _Object) -> dict[str, Any]:
    """Returns the tensors of a TorchScript module and its submodules, by dotted name."""
    tensors, modules, visits = {}, [("", root)], itertools.count()
    for prefix, module in modules:  # grows during the loop
        for key, value in module.items():
            name = prefix + key
            if len(name) > MAX_NAME or next(visits) > MAX_VISITS:
                raise InputError("holds modules nested too deeply or in a cycle")
            if _tensor(value):
                tensors[name] = value
            elif isinstance(value, _Object) and value.name.startswith(_MODULE):
                modules.append((name + ".", value))
    return tensors


def _tensor(value: Any) -> tuple[_Storage, Any, tuple, tuple] | None:
    """Returns unchecked (storage, offset, size, stride), or None if `value` is not a tensor."""
    match value:
        case _Object("torch._utils._rebuild_parameter", (_Object() as tensor, *_)):
            return _tensor(tensor)
        case _Object(name, (_Storage() as storage, offset, tuple(size), tuple(stride), *rest)):
            if name in _REBUILD and not any(rest[2:]):  # metadata: a conjugate or negative view
                return storage, offset, size, stride
    return None


def _array(read: Read, storage: _Storage, offset: Any, size: tuple, stride: tuple) -> np.ndarray:
    """Returns a read-only view of the storage's bytes, after checking that it lies within them."""
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


def write_archive(path: str | os.PathLike, tensors: Mapping[str, Any]) -> None:
    """Writes {name: array} atomically to a file that torch.load reads as an OrderedDict.

    Raises:
        InputError: an array has a type that PyTorch does not support.
    """
    path = Path(path)
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            raise InputError(f"{path}: cannot store {name}: PyTorch has no type {array.dtype}")
    entries = {"data.pkl": _pickle(arrays), "byteorder": b"little"}
    entries |= {f"data/{number}": array for number, array in enumerate(arrays.values())}
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, data in (entries | {"version": b"3\n"}).items():
            data = data if isinstance(data, bytes) else data.tobytes()
            # A ZipInfo has no time of its own: the same tensors give the same bytes.
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns the pickle of an OrderedDict of tensors, each in its own storage."""

    def push(*values: Any) -> bytes:  # without PROTO and STOP
        return b"".join(pickle.dumps(value, 2)[2:-1] for value in values)

    kinds = {dtype: kind.replace(".", "\n") for kind, dtype in DTYPES.items()}
    parts = [b"\x80\2ccollections\nOrderedDict\n)R("]
    for number, (name, array) in enumerate(arrays.items()):
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        parts += [
            push(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + push("storage"),
            f"c{kinds[array.dtype]}\n".encode() + push(str(number), "cpu", array.size) + b"tQ",
            push(0, array.shape, tuple(strides)) + b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join(parts) + b"u."
