"""Validates banks of captions, from which the hubness bias of segments is computed."""

import hashlib
from collections.abc import Iterable

from xclip_jax.cli import InputError
from xclip_jax.data.tokenizer import is_blank
from xclip_jax.metrics import MAX_CAPTIONS, MIN_CAPTIONS


def check_bank(captions: Iterable[str], source: str = "bank") -> list[str]:
    """Returns the captions that are not blank, each as one line of valid Unicode.

    Raises InputError, which names the `source`, if there are too few or too many.
    """
    if isinstance(captions, str):
        raise InputError(f"{source}: {captions!r:.99}: must be a list of captions")
    lines = [" ".join(caption.split()) for caption in captions if not is_blank(caption)]
    if not MIN_CAPTIONS <= len(lines) <= MAX_CAPTIONS:
        needed = f"must be {MIN_CAPTIONS:,} to {MAX_CAPTIONS:,}, one on each line"
        advice = f"; choose some at random: shuf -n {MAX_CAPTIONS}" * (len(lines) > MAX_CAPTIONS)
        raise InputError(f"{source}: {len(lines):,} captions that are not blank, {needed}{advice}")
    return [line.encode("utf-8", "replace").decode() for line in lines]  # lone surrogates


def digest_bank(captions: Iterable[str]) -> str:
    """Returns 16 hexadecimal digits computed from a bank's captions."""
    return hashlib.blake2b("\n".join(captions).encode(), digest_size=8).hexdigest()
