"""Shared by all commands: arguments, config files, one-line errors, progress bars, atomic files."""

import argparse
import contextlib
import inspect
import json
import logging
import os
import re
import runpy
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict
from tqdm import tqdm

PathLike = str | os.PathLike
MAX_JSON_BYTES = 1 << 24
MAX_MESSAGE = 4000  # characters of an error


class InputError(ValueError):
    """An error in the user's input: the message names it, its value and what is allowed."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


MOUNT = "mount the bucket (for example with gcsfuse or s3fs) and pass its folder"


def check_local(name: str, path: PathLike, advice: str = MOUNT) -> Path:
    """Returns a path of this machine's file system, or raises InputError if it is a URI."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise InputError(f"{name}={path}: must be a path of this machine: {advice}")
    if str(path) != str(path).encode("utf-8", "replace").decode():  # on Linux, any bytes
        raise InputError(f"{name}={path!s}: must be a name in UTF-8")
    return Path(path)


def explain_no_file(path: PathLike) -> str | None:
    """Returns why an existing path is no file, or None.

    Opening a FIFO, which an archive may contain, would wait forever.
    """
    if not os.path.exists(path) or os.path.isfile(path):
        return None
    return "is a folder" if os.path.isdir(path) else "is not a regular file"


def check_file(path: Path) -> None:
    """Raises InputError if an existing path is no file."""
    if reason := explain_no_file(path):
        raise InputError(f"{path}: {reason}")


def read_json(path: Path) -> Any:
    """Reads JSON from a regular file of at most MAX_JSON_BYTES.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is no regular file, too large, or not valid.
    """
    check_file(path)
    if not path.exists():
        raise FileNotFoundError(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path}: is larger than {MAX_JSON_BYTES:,} bytes")
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON: {first_line(error)}") from None


def list_some(items: Sequence[str], separator: str = "; ", limit: int = 5) -> str:
    """Returns the first items, and the number of the others."""
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(f"{item:.300}" for item in items[:limit]) + more


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Yields a new path next to `path`, whose file replaces `path` at the end."""
    partial = Path(f"{path}.{uuid.uuid4().hex}.part")  # unique: several processes may write it
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: PathLike, content: str | bytes) -> None:
    """Writes bytes, or text as UTF-8, to a file atomically."""
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an error of the input into one line on stderr and exit status 1.

    That is an InputError, OSError or, for a number of the config, OverflowError.
    """
    try:
        yield
    except (InputError, OSError, OverflowError) as error:
        message = " ".join(str(error).splitlines())
        sys.exit("error: " + message[:MAX_MESSAGE] + " ..." * (len(message) > MAX_MESSAGE))
    except KeyboardInterrupt:
        sys.exit("interrupted")


@contextlib.contextmanager
def terminate_like_ctrl_c() -> Iterator[None]:
    """Makes SIGTERM, which schedulers and clouds send before they stop, a KeyboardInterrupt."""
    former = signal.getsignal(signal.SIGTERM)
    if former is None or threading.current_thread() is not threading.main_thread():
        yield  # it cannot be changed, or not restored
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def run_command(command: Callable[[], object]) -> None:
    """Runs a command line and, if it fails, ends the process without interpreter shutdown.

    During shutdown, interrupted threads of XLA and Orbax would crash or print tracebacks.
    """
    logging.captureWarnings(True)
    # Orbax's import has added a handler with another format.
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax also raises what it logs
    status = None
    try:
        command()
    except SystemExit as stop:
        status = stop.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except Exception:  # a bug; other processes of the program must not wait for this one
        traceback.print_exc()
        status = 1
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def show_log_times() -> None:
    """Starts the lines of the log with the time, for commands that run for days."""
    for handler in logging.root.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))


class CommandParser(argparse.ArgumentParser):
    """An argument parser that keeps the layout of docstrings and reports errors in one line."""

    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"formatter_class": formatter, "allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        """Exits with status 2 and one line on stderr."""
        self.exit(2, f"error: {message}\n")


def parse_with_config(
    parser: CommandParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, Any, dict[str, Any]]:
    """Returns (arguments, config, {field: value}) of a command line with --config.FIELD=VALUE.

    Raises InputError if the config file fails, or an argument or a field is unknown or malformed.
    """
    text = "a file of configs/, with its argument after a colon; --config.a.b=value sets a field"
    parser.add_argument("--config", required=True, metavar="FILE", help=text)
    arguments, others = parser.parse_known_args(argv)
    config = call_user_file("--config", arguments.config, "get_config")
    config.lock()
    fields = {}
    for argument in others:
        if not (override := re.fullmatch(r"--config\.([\w.]+)=(.*)", argument, re.DOTALL)):
            rule = "every option starts with --, see --help"
            raise InputError(f"{argument}: unknown option or no =VALUE; {rule}")
        fields[override[1]] = _set_field(config, *override.groups())
    return arguments, config, fields


def call_user_file(option: str, file: str, function: str, *inputs: Any) -> Any:
    """Returns what a function in a user's Python file returns.

    `option` is the command-line option that names the file. Text after a colon is one more input.
    Raises InputError if the file is missing or raises an exception; the message names the line.
    """
    path, _, argument = file.partition(":")
    if not Path(path).is_file():
        raise InputError(f"{option}={path}: no such file")
    inputs = (*inputs, argument) if argument else inputs
    try:
        called = runpy.run_path(path)[function]
        if argument and len(inspect.signature(called).parameters) < len(inputs):
            raise InputError(f"{option}={file}: the file takes nothing after the colon")
        return called(*inputs)
    except InputError:
        raise
    except Exception as error:  # a user's code may raise any exception
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {frame.lineno}" for frame in frames if frame.filename == path]
        where = "".join(lines[-1:])
        raise InputError(f"{option}={path}{where}: {type(error).__name__}: {error}") from None


def _set_field(config: Any, field: str, text: str) -> Any:
    """Sets a dotted field to a text converted to the field's type, and returns the value."""
    *groups, name = field.split(".")
    for key in groups:
        config = config.get(key) if isinstance(config, ConfigDict) else None
    if not isinstance(config, ConfigDict) or name not in config:
        raise InputError(f"--config has no field {field}: see xclip_jax/config.py for all fields")
    kind = config.get_type(name)
    if kind not in _CONVERTERS:
        raise InputError(f"--config.{field} is a group of fields: write --config.{field}.NAME")
    is_none = text == "None" and config[name] is None
    try:
        config[name] = None if is_none else _CONVERTERS[kind](text)
    except (ValueError, KeyError):
        raise InputError(f"--config.{field}={text}: must be of type {kind.__name__}") from None
    return config[name]


_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_CONVERTERS: dict[type, Callable[[str], Any]] = {int: int, float: float, str: str}
_CONVERTERS[object] = lambda text: int(text) if re.fullmatch(r"-?\d+", text) else text
_CONVERTERS[bool] = lambda text: _BOOLS[text.lower()]
_CONVERTERS[tuple] = lambda text: tuple(re.findall(r"[^\s,()'\"]+", text))  # ('a', 'b') or a,b

progress_disabled = False  # True in all processes of a program except the first
_progress_lock = threading.RLock()  # tqdm's default is a semaphore, leaked if a process is killed


def progress(total: int, desc: str, unit: str, initial: int = 0) -> tqdm:
    """Returns a tqdm bar with rate and remaining time (unit "B": scaled to kB, MB, ...)."""
    tqdm.set_lock(_progress_lock)
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit == "B",
        disable=progress_disabled,
        initial=initial,
        mininterval=interval,
        maxinterval=2 * interval,
        dynamic_ncols=True,
    )
