"""PyTorch checkpoint files without PyTorch: reads them into NumPy, whoever made them; writes them.

A checkpoint is a pickle next to raw storages, and a pickle is a program. Only the instructions that
build plain values are run, and nothing that the pickle names is imported: a global stays its name,
so that there is never anything to call.
"""

import functools
import io
import itertools
import math
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

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
# What torch.save (protocols 2 and 4) and TorchScript write. INST is there to name what it asks for.
OPCODES = """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS BINGET LONG_BINGET BINPUT
    LONG_BINPUT MEMOIZE BINPERSID GLOBAL STACK_GLOBAL INST REDUCE NEWOBJ BUILD"""
# A large model's pickle has less than 1 MiB; each byte can make a hundred bytes of objects.
MAX_PICKLE = 8 << 20
MAX_DIRECTORY = 16 << 20  # bytes that list the entries of a zip file
MAX_VISITS, MAX_NAME = 100_000, 1000  # in the walk through TorchScript modules
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass
class Archive:
    """What a checkpoint file holds.

    Attributes:
        tensors: {name: array}, read-only, strided and sharing memory as they were saved.
        torchscript: whether it is a TorchScript archive, such as OpenAI's CLIP.
        nested: whether the weights lay under the key `state_dict` of a training checkpoint.
    """

    tensors: dict[str, np.ndarray]
    torchscript: bool
    nested: bool


def read_archive(path):
    """Reads a file of torch.save, older ones included, or of torch.jit.save into an Archive.

    Raises:
        InputError: it is none, is damaged or asks for more than tensors; names the file.
        OSError: it is missing or may not be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a file")
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        try:
            if head.startswith(b"PK\3\4"):
                return _read_zip(file)
            if head.startswith(b"\x80"):  # a pickle
                return _read_legacy(file)
            raise InputError(_not_a_checkpoint(head))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # zipfile, pickle and NumPy raise a dozen types on damaged bytes
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            raise InputError(f"{path}: is damaged or no PyTorch checkpoint ({reason})") from None


def _not_a_checkpoint(head):
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights themselves: fetch them with `git lfs pull`"
    if head[8:10] == b'{"':
        return "is a safetensors file, not a PyTorch checkpoint: its name must end in .safetensors"
    return "is not a PyTorch checkpoint (a file of torch.save or torch.jit.save)"


def _read_zip(file):
    directory = zipfile._EndRecData(file)  # ZipFile itself makes an object of each entry at once
    if directory and directory[zipfile._ECD_SIZE] > MAX_DIRECTORY:
        raise InputError("lists too many entries")
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise InputError("has two entries of one name")
        if sum(entry.compress_size for entry in entries.values()) > os.fstat(file.fileno()).st_size:
            raise InputError("has entries that overlap")
        roots = [name.split("/")[0] for name in entries if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise InputError("is a zip file, but no PyTorch checkpoint: must hold one */data.pkl")

        def read(name):
            entry = entries.get(f"{roots[0]}/{name}")
            if entry is None:
                raise InputError(f"lacks the entry {name!r:.99}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise InputError(f"has a compressed entry {name!r:.99}, must be stored")
            if name == "data.pkl" and entry.file_size > MAX_PICKLE:
                raise InputError(f"has a pickle of more than {MAX_PICKLE} bytes")
            return archive.read(entry)  # checks the CRC

        if f"{roots[0]}/byteorder" in entries and read("byteorder") != b"little":
            raise InputError("is not little-endian")
        parts = {name.split("/")[1] for name in entries if name.startswith(f"{roots[0]}/")}
        torchscript = bool(parts & {"constants.pkl", "code"})
        root = _Unpickler(io.BytesIO(read("data.pkl")), torchscript).load()
        return _archive(root, torchscript, lambda key: read(f"data/{key}"))


def _read_legacy(file):
    """The format before PyTorch 1.6: five pickles, then each storage as its length and bytes."""
    stream = io.BytesIO(file.read(MAX_PICKLE))
    if _Unpickler(stream).load() != LEGACY_MAGIC:
        raise InputError("is a pickle, but no PyTorch checkpoint")
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
        raise InputError("is cut short")

    def read(key):
        file.seek(places[key] - 8)
        if int.from_bytes(file.read(8), "little") != unpickler.storages[key].numel:
            raise InputError(f"has a storage {key!r:.99} of another size than its tensors'")
        return file.read(unpickler.storages[key].nbytes)

    return _archive(root, False, read)


@dataclass
class _Storage:
    key: str
    dtype: np.dtype
    numel: int

    @property
    def nbytes(self):
        return self.numel * self.dtype.itemsize


@dataclass
class _Tensor:
    """Unread and unchecked: the optimizer's state in a training checkpoint stays so."""

    storage: _Storage
    offset: int
    size: tuple
    stride: tuple


class _Dict(dict):
    """A dict or OrderedDict."""

    def __setitem__(self, key, value):
        # The hash of nested tuples can crash the interpreter or take forever, large ints collide.
        if type(key) is not str and not (type(key) is int and 0 <= key < 1 << 60):
            raise InputError("has a pickle with keys that are not strings or small integers")
        super().__setitem__(key, value)


class _Module(_Dict):
    """A TorchScript module: its attributes."""


def _refuse_opcode(unpickler):
    raise InputError("has a pickle with instructions that no checkpoint needs")


class _Unpickler(pickle._Unpickler):
    """Builds plain values, _Dict, _Tensor and _Module; a global is pushed as its name, a string.

    The base is the one in pure Python: the C one's memo is an array, gigabytes for one huge index.
    """

    dispatch = dict.fromkeys(range(256), _refuse_opcode)
    for _code in (getattr(pickle, name)[0] for name in OPCODES.split()):
        dispatch[_code] = pickle._Unpickler.dispatch[_code]

    def __init__(self, file, torchscript=False):
        super().__init__(file, encoding="utf-8")
        self.torchscript = torchscript
        self.storages = {}

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("torch.cuda.", "torch.")
        script = name.startswith(("__torch__.", "torch.jit._pickle."))
        if name in {"collections.OrderedDict", *DTYPES, *REBUILD} or (script and self.torchscript):
            return name
        raise InputError(f"refused: its pickle asks for {name!r:.99}, must be plain tensors")

    def persistent_load(self, pid):
        match pid:
            case "storage", str(kind), str(key), _, int(numel), *views if not any(views):
                storage = _Storage(key, DTYPES[kind], numel)
                if numel >= 0 and self.storages.setdefault(key, storage) == storage:
                    return storage
        raise InputError("has a pickle with a malformed storage")

    def _reduce(self):
        args, name = self.stack.pop(), self.stack.pop()
        match name, args:
            case "collections.OrderedDict", ():
                self.append(_Dict())
            case (
                "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
                (_Storage() as storage, offset, tuple(size), tuple(stride), *rest),
            ) if not any(rest[2:]):  # metadata: a conjugate or negative view
                self.append(_Tensor(storage, offset, size, stride))
            case "torch._utils._rebuild_parameter", (_Tensor() as tensor, *_):
                self.append(tensor)
            case str(), _ if name.startswith("torch.jit._pickle."):
                self.append(None)  # lists of numbers
            case _:
                raise InputError("has a pickle with a malformed call")

    def _newobj(self):
        _, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not name.startswith("__torch__."):
            raise InputError("has a pickle with a malformed object")
        self.append(_Module())

    def _build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Module) and isinstance(state, _Dict):
            target.update(state)  # an OrderedDict's state, _metadata, is of no use here

    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(_Dict())
    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.NEWOBJ[0]] = _newobj
    dispatch[pickle.BUILD[0]] = _build


def _archive(root, torchscript, read):
    """Archive of an unpickled file; read: storage key -> bytes."""
    inner = root.get("state_dict") if isinstance(root, _Dict) else None
    nested = isinstance(inner, _Dict) and not torchscript
    found = _of_modules(root) if torchscript else _of_dict(inner if nested else root)
    if not found:
        raise InputError("holds no tensors")
    prefix = "module." if all(name.startswith("module.") for name in found) else ""
    read = functools.cache(read)
    tensors = {name.removeprefix(prefix): _array(tensor, read) for name, tensor in found.items()}
    return Archive(tensors, torchscript, nested)


def _of_dict(root):
    """{name: _Tensor} of a state dict; numbers and such among them are left out."""
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


def _of_modules(root):
    """{dotted name: _Tensor} of TorchScript modules."""
    if not isinstance(root, _Module):
        raise InputError("holds no TorchScript module")
    tensors, modules, visits = {}, [("", root)], itertools.count()
    for prefix, module in modules:  # which grows meanwhile
        for key, value in module.items():
            name = prefix + key
            if len(name) > MAX_NAME or next(visits) > MAX_VISITS:
                raise InputError("holds modules nested too deep or in a circle")
            if isinstance(value, _Tensor):
                tensors[name] = value
            elif isinstance(value, _Module):
                modules.append((name + ".", value))
    return tensors


def _array(tensor, read):
    """Read-only array, a view of the storage's bytes: nothing in it lies outside of them."""
    storage, offset, size, stride = tensor.storage, tensor.offset, tensor.size, tensor.stride
    numbers = all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
    if not numbers or len(size) != len(stride) or len(size) > 32:
        raise InputError("has a tensor of malformed shape")
    count = math.prod(size)
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if count > storage.numel or (count and end > storage.numel):
        raise InputError(f"has a tensor of shape {size!s:.99}, larger than its storage")
    data = read(storage.key)
    if len(data) != storage.nbytes:
        raise InputError(f"has a storage {storage.key!r:.99} of another size than its tensors'")
    itemsize = storage.dtype.itemsize
    steps = [step * itemsize for step in stride]
    return np.ndarray(size, storage.dtype, data, offset * itemsize, steps)


def write_archive(path, tensors):
    """Writes {name: array} whole or not at all, for torch.load to read as an OrderedDict.

    Raises:
        InputError: PyTorch has no tensors of an array's type.
    """
    path = Path(path)
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            raise InputError(f"{path}: cannot hold {name}, which is of type {array.dtype}")
    partial = path.with_name(path.name + ".part")
    with zipfile.ZipFile(partial, "w") as archive:

        def write(name, data):  # a ZipInfo has no time of its own: the same tensors, the same bytes
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)

        write("data.pkl", _pickle(arrays))
        write("byteorder", "little")
        for number, array in enumerate(arrays.values()):
            write(f"data/{number}", array.tobytes())
        write("version", "3\n")
    os.replace(partial, path)


def _pickle(arrays):
    """The pickle of an OrderedDict of tensors, each in a storage of its own."""
    kinds = {dtype: kind.replace(".", "\n") for kind, dtype in DTYPES.items()}
    parts = [b"\x80\2ccollections\nOrderedDict\n)R("]
    for number, (name, array) in enumerate(arrays.items()):
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        parts += [
            _values(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + _values("storage"),
            f"c{kinds[array.dtype]}\n".encode() + _values(str(number), "cpu", array.size) + b"tQ",
            _values(0, array.shape, tuple(strides)) + b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join(parts) + b"u."


def _values(*values):
    """The instructions that push plain values: their pickles without the first and last of them."""
    return b"".join(pickle.dumps(value, 2)[2:-1] for value in values)
