"""Turns errors of the database into one line."""

import contextlib
import textwrap
from collections.abc import Iterator

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
        _check_access(location)
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        problem = f"the index {location} cannot be read: {reason}"
        advice = "if it is corrupted, delete it and index the videos again"
        raise UnreadableError(f"{problem}; {advice}") from error


def _check_access(location: str) -> None:
    """Raises UnreadableError, which says what to do, if a bucket cannot be accessed."""
    if location.partition("://")[0] not in ADVICE:
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            BucketPath(location).list_files(recursive=False)
    except InputError as error:
        raise UnreadableError(str(error)) from None
