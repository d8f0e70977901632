"""Digests of the files in a folder, by which corrupted files are noticed before they are used."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from xclip_jax.cli import check_file, write_atomically

DIGESTS = "digests.json"


def write_digests(folder: Path, notes: Mapping[str, Any] | None = None, skip: str = "") -> None:
    """Writes the digests of all files in a folder to its digests.json, which keeps `notes`, too.

    `skip` is a pattern of names of files to leave out, such as `*.txt`.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in _list_files(folder)}
    files = {n: _digest(path) for n, path in paths.items() if not fnmatch(path.name, skip)}
    content = {"files": files, "notes": dict(notes or {})}
    content["check"] = _digest_json(content)
    write_atomically(folder / DIGESTS, json.dumps(content, indent=1))


def read_digests(folder: Path) -> dict[str, Any] | None:
    """Returns the content of digests.json, or None if it is missing or itself corrupted."""
    path = folder / DIGESTS
    try:
        check_file(path)
        content = json.loads(path.read_text())
        if content.pop("check") == _digest_json(content):
            return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    logging.warning("%s is corrupted: the files beside it are not checked", path)
    return None


def find_corruption(folder: Path, files: Iterable[str] | None = None) -> str | None:
    """Returns which file of a folder differs from its digest, or None.

    `files` are the paths to check, relative to the folder; None: all. A folder without
    digests.json is not checked.
    """
    if (content := read_digests(folder)) is None:
        return None
    digests = content["files"]
    for name in digests if files is None else files:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if name in digests and _digest(path) != digests[name]:
            return f"{path} is corrupted: it differs from its digest in {DIGESTS}"
    return None


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
