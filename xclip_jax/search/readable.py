"""Turns errors of the database into one line."""

import contextlib
import textwrap
from collections.abc import Iterator

from xclip_jax.cli import InputError


@contextlib.contextmanager
def readable(location: str) -> Iterator[None]:
    """Raises database errors as InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # LanceDB has no common type, and may panic
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        problem = f"the index {location} cannot be read: {reason}"
        advice = "if it is corrupted, delete it and index the videos again"
        raise InputError(f"{problem}; {advice}") from error
