"""Reads and writes PyTorch checkpoint files without PyTorch.

A checkpoint is a pickle beside raw storages, and a pickle is a program. Here it is interpreted
instruction by instruction: a name in it is compared with a list, nothing is imported or called.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from xclip_jax.cli import InputError

# PyTorch's classes of storages and the types of their numbers.
_TYPES = {"Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64"}
_TYPES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
DTYPES = {f"torch.{k}Storage": jnp.dtype(v) for k, v in (_TYPES | {"Bool": "bool"}).items()}
_DICT, _MODULE = "collections.OrderedDict", "__torch__."
_REBUILD = [f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter")]
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# A large model's pickle has less than 1 MiB; each byte can make over a hundred bytes of objects.
MAX_PICKLE = 8 << 20
MAX_DIRECTORY = 16 << 20  # bytes that list the entries of a zip file
MAX_VISITS, MAX_NAME = 100_000, 1000  # limits on walking through TorchScript modules
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


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


@dataclass
class _Object:
    """A name in a pickle and, if it was called, its arguments and the items of the result."""

    name: str
    args: Any = None
    items: dict[str, Any] = field(default_factory=dict)


def _unpickle(stream: io.BytesIO, storages: dict[str, _Storage], torchscript: bool = False) -> Any:
    """Returns the object of a stream's next pickle: plain values, _Storage and _Object.

    Storages are added to `storages`. Dicts get only the items whose keys are strings: others are
    never read, and to hash them may take forever.
    """
    stack, marks, memo = [], [], {}

    def pop_to_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for code, arg, _ in pickletools.genops(stream):
        match code.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_CONSTANTS[code.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(arg)
            case "BINSTRING" | "SHORT_BINSTRING" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if code.name == "EMPTY_LIST" else _Object(_DICT))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(code.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if code.name == "APPEND" else pop_to_mark()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if code.name == "SETITEM" else pop_to_mark()
                pairs = zip(items[::2], items[1::2], strict=True)
                stack[-1].items.update((k, v) for k, v in pairs if type(k) is str)
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if arg is None else arg] = stack[-1]
            case "BINPERSID":
                stack.append(_storage(stack.pop(), storages))
            case "GLOBAL" | "INST" | "STACK_GLOBAL":
                names = [stack.pop(-2), stack.pop()] if arg is None else str(arg).split(" ", 1)
                stack.append(_global(".".join(names), torchscript))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                stack.append(_Object(function.name, args))
            case "BUILD":
                state = stack.pop()
                if stack[-1].name.startswith(_MODULE):
                    stack[-1].items.update(state.items)
            case "STOP":
                return stack.pop()
            case _:
                raise InputError(f"has a pickle with the instruction {code.name}: not allowed")


def _storage(pid: Any, storages: dict[str, _Storage]) -> _Storage:
    match pid:
        case "storage", _Object(kind), str(key), _, int(numel), *views if not any(views):
            storage = _Storage(key, DTYPES[kind], numel)
            if numel >= 0 and storages.setdefault(key, storage) == storage:
                return storage
    raise InputError("has a pickle with a malformed storage")


def _global(name: str, torchscript: bool) -> _Object:
    """Returns the name of a storage, a dict, a function that makes tensors or a module."""
    name = name.replace("torch.cuda.", "torch.")
    is_script = torchscript and name.startswith((_MODULE, "torch.jit._pickle."))
    if is_script or name in (*DTYPES, *_REBUILD, _DICT):
        return _Object(name)
    raise InputError(f"has a pickle that refers to {name!r:.99}: only plain tensors are allowed")


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
            text = f"is corrupted or not a PyTorch checkpoint ({cause})"
            raise InputError(
                f"{path}: {error if isinstance(error, InputError) else text}"
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
        root = _unpickle(io.BytesIO(read("data.pkl")), {}, torchscript)
        return _archive(root, torchscript, lambda key: read(f"data/{key}"))


def _read_legacy(file: BinaryIO) -> Archive:
    """Reads the format before PyTorch 1.6: five pickles, then each storage's length and bytes."""
    stream, storages = io.BytesIO(file.read(MAX_PICKLE)), {}
    if _unpickle(stream, {}) != LEGACY_MAGIC:
        raise InputError("is a pickle, but not a PyTorch checkpoint")
    _, system = _unpickle(stream, {}), _unpickle(stream, {})
    if system.items.get("little_endian") is not True:
        raise InputError("is not little-endian")
    root, keys = _unpickle(stream, storages), _unpickle(stream, {})
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


def _archive(root: Any, torchscript: bool, read: Callable[[str], bytes]) -> Archive:
    """Returns the Archive of an unpickled file, of whose storages `read` returns the bytes."""
    if not (isinstance(root, _Object) and root.name.startswith(_MODULE if torchscript else _DICT)):
        raise InputError("holds no dict of tensors or TorchScript module")
    inner: Any = root.items.get("state_dict")
    nested = isinstance(inner, _Object) and not torchscript
    values = _module_tensors(root) if torchscript else (inner if nested else root).items
    for name, value in values.items():
        if not isinstance(value, bool | int | float | str | None) and _tensor(value) is None:
            raise InputError(
                f"{name!r:.99} is not a tensor: must hold a dict of tensors, alone or under the "
                "key 'state_dict'"
            )
    unread = {name: tensor for name, value in values.items() if (tensor := _tensor(value))}
    if not unread:
        raise InputError("holds no tensors")
    prefix = "module." if all(name.startswith("module.") for name in unread) else ""
    read = functools.cache(read)
    tensors = {name.removeprefix(prefix): _array(read, *tensor) for name, tensor in unread.items()}
    return Archive(tensors, torchscript, nested)


def _module_tensors(root: _Object) -> dict[str, Any]:
    """Returns the tensors of a TorchScript module and its submodules, by dotted name."""
    tensors, modules, visits = {}, [("", root)], itertools.count()
    for prefix, module in modules:  # grows during the loop
        for key, value in module.items.items():
            name = prefix + key
            if len(name) > MAX_NAME or next(visits) > MAX_VISITS:
                raise InputError("holds modules nested too deeply or in a cycle")
            if _tensor(value):
                tensors[name] = value
            elif isinstance(value, _Object) and value.name.startswith(_MODULE):
                modules.append((name + ".", value))
    return tensors


def _tensor(value: Any) -> tuple[_Storage, Any, tuple, tuple] | None:
    """Returns (storage, offset, size, stride), not yet checked, or None if it is no tensor."""
    match value:
        case _Object("torch._utils._rebuild_parameter", (_Object() as tensor, *_)):
            return _tensor(tensor)
        case _Object(name, (_Storage() as storage, offset, tuple(size), tuple(stride), *rest)):
            if name in _REBUILD and not any(rest[2:]):  # metadata: a conjugate or negative view
                return storage, offset, size, stride
    return None


def _array(
    read: Callable[[str], bytes], storage: _Storage, offset: Any, size: tuple, stride: tuple
) -> np.ndarray:
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
    partial = path.with_name(path.name + ".part")
    with zipfile.ZipFile(partial, "w") as archive:
        for name, data in (entries | {"version": b"3\n"}).items():
            data = data if isinstance(data, bytes) else data.tobytes()
            # A ZipInfo has no time of its own: the same tensors give the same bytes.
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    os.replace(partial, path)


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
