"""Handmade PyTorch checkpoints, and assertions about reading them.

Arguments called `pushed` are pickle instructions that push one object, and a `program` is a
complete pickle.
"""

import pickle
import re
import signal
import struct
import zipfile

import numpy as np
import pytest

from xclip_jax.cli import InputError
from xclip_jax.convert import torch_archive
from xclip_jax.convert.torch_archive import read_archive

WEIGHTS = np.arange(6, dtype=np.float32)
BYTES = WEIGHTS.tobytes()


@pytest.fixture(autouse=True)
def limit_processor_time():
    def fail(*_):
        pytest.fail("takes too long")  # not an Exception: the reader does not catch it

    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, 20)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


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
    """Returns a file of the legacy format, which is not a zip file, from two programs."""
    heads = (torch_archive.LEGACY_MAGIC, 1001, {"little_endian": little})
    return b"".join(program(push(head)) for head in heads) + root + keys + data


PLAIN = program(
    push_dict({"a": push_tensor(), "b.c": push_tensor(key="1", size=(2, 3), stride=(3, 1))})
)
SCRIPT = program(push_module({"a": push_tensor(), "b": push_module({"c": push_tensor(key="1")})}))
LEGACY = program(push_dict({"a": push_tensor(size=(3, 2), stride=(1, 3), more=b"N")}))


def assert_refused(path, message=": "):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_archive(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 300
