"""Shares the files of a job array out, and allows one writer of each file at a time."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from xclip_jax.cli import InputError
from xclip_jax.search.encoding import hash_path

_GATE_SECONDS = 10  # time to wait while other processes take their locks


class BusyError(InputError):
    """The error that another process is adding to an index: a later attempt may succeed."""


@dataclasses.dataclass(frozen=True)
class ArrayShard:
    """The part `index` of the files, 0 <= index < count, chosen by a hash of their paths."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "ArrayShard":
        """Parses i/n, or raises InputError."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        index, count = map(int, match.groups()) if match else (0, 0)
        if index >= count:
            raise InputError(f"--shard={text}: must be i/n with 0 <= i < n, such as 0/4")
        return cls(index, count)

    def __contains__(self, path: str) -> bool:
        return hash_path(path) % self.count == self.index

    @property
    def lock_name(self) -> str:
        """Name of the file that is locked while this shard is written."""
        number = f"-{self.index}-of-{self.count}" if self.count > 1 else ""
        return f"writer{number}.lock"


@contextlib.contextmanager
def lock_files(location: str, shard: ArrayShard) -> Iterator[None]:
    """Raises BusyError if another process is adding files of the same shard.

    All shards of one count may be written at the same time. A bucket has no locks.
    """
    if "://" in location:
        yield
        return
    own = Path(location, shard.lock_name)
    compatible = f"-of-{shard.count}.lock" if shard.count > 1 else own.name
    with contextlib.ExitStack() as held:
        try:
            with FileLock(Path(location, "gate.lock"), timeout=_GATE_SECONDS):
                held.enter_context(FileLock(own, timeout=0))
                for other in Path(location).glob("writer*.lock"):
                    if not other.name.endswith(compatible):
                        with FileLock(other, timeout=0):
                            pass
        except Timeout:
            raise BusyError(f"another process is adding to {location}") from None
        yield
