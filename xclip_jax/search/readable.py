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
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        problem = f"the index {location} cannot be read: {reason}"
        if refusal := _find_refusal(location):
            raise UnreadableError(f"{refusal}; {problem}") from error
        advice = "if it is corrupted, delete it and index the videos again"
        raise UnreadableError(f"{problem}; {advice}") from error


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
