"""Reads and writes files in buckets (s3:// and gs://) through pyarrow, beside files on disk.

Access is set by the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and, for a
service other than Amazon's, AWS_ENDPOINT_URL or AWS_ENDPOINT; GOOGLE_APPLICATION_CREDENTIALS.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xclip_jax.cli import (
    InputError,
    PathLike,
    atomic_file,
    check_local,
    first_line,
    write_atomically,
)

CHUNK_BYTES = 16 << 20  # read or written in one request
SCRATCH = "xclip_jax-files-"  # prefix of the folders of temporary files
ADVICE = {
    "s3": "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, and AWS_ENDPOINT_URL for a "
    "service other than Amazon's",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login",
}


@dataclasses.dataclass(frozen=True, order=True)
class BucketPath:
    """An object or a folder in a bucket.

    A method raises InputError, with the URI and the variables to set, if the bucket cannot be
    reached or refuses access, and FileNotFoundError if the object is missing.
    """

    uri: str  # scheme://bucket/path, without a final slash

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath(f"{self.uri}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.uri.rpartition("/")[2]

    @property
    def scheme(self) -> str:
        """The part before the colon: s3 or gs."""
        return self.uri.partition(":")[0]

    def list_files(self, *, recursive: bool = True) -> list["BucketFile"]:
        """Returns the objects in this folder, from one listing of 1,000 objects per request."""
        from pyarrow.fs import FileSelector, FileType

        with self._explain_errors():
            selector = FileSelector(self._key, recursive=recursive)
            infos = self._files.get_file_info(selector)
        files = (info for info in infos if info.type == FileType.File)
        return [BucketFile(f"{self.scheme}://{f.path}", f.size, f.mtime_ns) for f in files]

    def is_file(self) -> bool:
        """Returns True if this is an object."""
        from pyarrow.fs import FileType

        with self._explain_errors():
            return self._files.get_file_info(self._key).type == FileType.File

    def chunks(self) -> Iterator[bytes]:
        """Yields the content of an object, CHUNK_BYTES at a time."""
        with self._explain_errors():
            source = self._files.open_input_file(self._key)
        with source:
            while True:
                with self._explain_errors():
                    chunk = source.read(CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk

    def write(self, content: bytes) -> None:
        """Writes an object atomically."""
        with self._explain_errors(), self._files.open_output_stream(self._key) as stream:
            stream.write(content)

    def upload(self, source: Path) -> None:
        """Writes an object from a file of this machine."""
        with (
            source.open("rb") as file,
            self._explain_errors(),
            self._files.open_output_stream(self._key) as stream,
        ):
            while chunk := file.read(CHUNK_BYTES):
                stream.write(chunk)

    def remove_tree(self) -> None:
        """Deletes all objects in this folder, if there are any."""
        with contextlib.suppress(FileNotFoundError), self._explain_errors():
            self._files.delete_dir(self._key)

    @property
    def _key(self) -> str:
        return self.uri.partition("://")[2]

    @property
    def _files(self) -> Any:
        """The file system of the bucket."""
        names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT")  # of the AWS tools, of LanceDB
        endpoints = [os.environ[name] for name in names if os.environ.get(name)]
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return _open_file_system(self.scheme, next(iter(endpoints), None), region)

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(f"{self}: no such object or folder") from None
        except (OSError, ArrowException) as error:
            problem = f"{self} cannot be accessed: {first_line(error):.500}"
            raise InputError(f"{problem}; {ADVICE[self.scheme]}") from None


@dataclasses.dataclass(frozen=True, order=True)
class BucketFile(BucketPath):
    """An object of a listing, with its size in bytes and its time of modification."""

    size: int
    mtime_ns: int | None


Location = Path | BucketPath


@functools.cache
def _open_file_system(scheme: str, endpoint: str | None, region: str | None) -> Any:
    """Returns pyarrow's file system of a scheme."""
    from pyarrow import fs

    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=30))
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=4),
        allow_delayed_open=True,  # a small object is then written in one request
    )


def parse_location(option: str, path: PathLike | BucketPath) -> Location:
    """Returns a path of this machine or in a bucket, or raises InputError for another URI."""
    if isinstance(path, BucketPath):
        return path
    if match := re.fullmatch(r"(s3|gs)://([^/]+)(/.*)?", str(path)):
        parts = [part for part in (match[3] or "").split("/") if part]
        return BucketPath("/".join([f"{match[1]}://{match[2]}", *parts]))
    return check_local(option, path, "pass a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER")


def read_file(path: Location) -> bytes:
    """Returns the content of a file, or raises FileNotFoundError."""
    return path.read_bytes() if isinstance(path, Path) else b"".join(path.chunks())


def write_file(path: Location, content: str | bytes) -> None:
    """Writes bytes, or text as UTF-8, to a file atomically, in a new folder if necessary."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    else:
        path.write(content.encode() if isinstance(content, str) else content)


def remove_tree(path: Location) -> None:
    """Deletes a folder, if it exists."""
    if isinstance(path, BucketPath):
        path.remove_tree()
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def new_file(path: Location) -> Iterator[Path]:
    """Yields a new path of this machine, whose file becomes `path` at the end, atomically."""
    if isinstance(path, Path):
        with atomic_file(path) as partial:
            yield partial
        return
    with scratch_folder() as folder:
        yield (partial := folder / "file")
        path.upload(partial)


@contextlib.contextmanager
def new_folder(path: Location, last: str = "") -> Iterator[Path]:
    """Yields a folder of this machine whose files are copied to `path`, if that is in a bucket.

    The file named `last` is copied after all others.
    """
    if isinstance(path, Path):
        yield path
        return
    with scratch_folder() as folder:
        yield folder
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        for file in sorted(files, key=lambda file: file.name == last):
            (path / file.relative_to(folder).as_posix()).upload(file)


@contextlib.contextmanager
def local_file(path: Location) -> Iterator[Path]:
    """Yields a file of this machine: the path, or a temporary copy of an object in a bucket."""
    if isinstance(path, Path):
        yield path
        return
    with scratch_folder() as folder:
        # FFmpeg considers the suffix when it detects the format.
        copy = folder / f"file{Path(path.name).suffix}"
        with copy.open("wb") as file:
            for chunk in path.chunks():
                file.write(chunk)
        yield copy


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a temporary folder, which a later process removes if this one is killed."""
    remove_stale_folders()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
        # Another process may have removed it before it was locked.
        if (lock := _lock(folder)) is not None and folder.is_dir():
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@functools.cache
def remove_stale_folders() -> None:
    """Removes the temporary folders of killed processes, once in a process."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        if (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Locks a folder until the returned descriptor is closed, or returns None.

    The lock of a killed process is released.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # removed meanwhile, or of another user
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
