"""Opens tables of the database, and turns its errors into one line."""

import contextlib
import textwrap
from collections.abc import Iterator
from typing import Any

import lancedb

from xclip_jax.buckets import ADVICE, BucketPath
from xclip_jax.cli import InputError


class UnreadableError(InputError):
    """The error that an index cannot be read: it is corrupted, deleted or out of reach."""


@contextlib.contextmanager
def readable(location: str) -> Iterator[None]:
    """Raises database errors as UnreadableError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # LanceDB has no common type, and may panic
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        problem = f"the index {location} cannot be read: {reason}"
        if refusal := _find_refusal(location):
            raise UnreadableError(f"{refusal}; {problem}") from error
        advice = "if it is corrupted, delete it and index the videos again"
        raise UnreadableError(f"{problem}; {advice}") from error


def find_table(location: str, name: str) -> Any | None:
    """Returns a table, or None if it does not exist or another process is just creating it.

    Its folder is there, and LanceDB lists it, before its first version is. Raises database errors.
    """
    database = lancedb.connect(location)
    if name not in database.table_names(limit=100):
        return None
    try:
        return database.open_table(name)
    except ValueError as error:
        if "was not found" not in str(error):
            raise
        return None


def _find_refusal(location: str) -> str:
    """Returns why a bucket cannot be accessed and what to set, "" if it can or for a folder."""
    if location.partition("://")[0] in ADVICE:
        try:
            BucketPath(location).list_files(recursive=False)
        except FileNotFoundError:
            pass
        except InputError as error:
            return str(error)
    return ""
