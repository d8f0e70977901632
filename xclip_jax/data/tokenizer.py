"""The interface of tokenizers, and the cleaning of texts.

Cleaning follows https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py, `canonicalize`
src/open_clip/tokenizer.py of https://github.com/mlfoundations/open_clip, and `to_sentence`
videoprism/models.py of https://github.com/google-deepmind/videoprism.
"""

import html
import string
import unicodedata
from collections.abc import Sequence

import ftfy
import numpy as np
from jaxtyping import Bool, Int32

from xclip_jax.cli import PathLike

FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that show nothing
_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))
_SPACES = str.maketrans(dict.fromkeys(string.punctuation, " "))


def clean(text: str) -> str:
    """Returns cleaned text: repaired Unicode, no HTML entities, single spaces, lower case."""
    return " ".join(_repair(text).split()).lower()


def canonicalize(text: str) -> str:
    """Returns a text cleaned as by `clean`, without ASCII punctuation, "_" replaced by a space."""
    return " ".join(_repair(text).translate(_NO_PUNCTUATION).lower().split())


def _repair(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def is_blank(text: str) -> bool:
    """Returns True if nothing visible is left of a text after cleaning."""
    if "&" in text or not (text.isascii() and text.isprintable()):  # cleaning removes something
        text = clean(text)
    return not any(
        unicodedata.category(letter)[0] in "LNPS" and letter not in FILLERS for letter in text
    )


def to_sentence(text: str) -> str:
    """Returns a text with spaces for ASCII punctuation, in lower case, and a full stop."""
    return " ".join(text.translate(_SPACES).lower().split()) + "."


def group_pieces(pieces: Sequence[str], starts: Sequence[bool]) -> list[list[str]]:
    """Returns the pieces of each word, whose first one is marked by True in `starts`."""
    groups: list[list[str]] = []
    for piece, is_first in zip(pieces, starts, strict=False):
        if is_first or not groups:
            groups.append([])
        groups[-1].append(piece)
    return groups


class Tokenizer:
    """A converter of texts to at most `max_words` token ids, 0 to vocab_size - 1.

    `special_tokens` are the numbers of special tokens before and after the words of each text,
    `pad` is the id after them. `start` and `end` are the ids of the start and end token.
    """

    special_tokens: tuple[int, int]
    max_words: int
    vocab_size: int
    start: int
    end: int
    pad: int

    def encode(self, text: str) -> list[int]:
        """Returns all ids of one text, cleaned, without start and end token."""
        raise NotImplementedError

    def tokens(self, text: str) -> list[str]:
        """Returns the tokens of a text in `tokenizer(texts)`, one readable string per id."""
        raise NotImplementedError

    def words(self, text: str) -> list[tuple[str, int]]:
        """Returns the words of a text in `tokenizer(texts)`, and the number of tokens of each."""
        raise NotImplementedError

    def save(self, folder: PathLike) -> None:
        """Writes a folder that `load_tokenizer` reads."""
        raise NotImplementedError

    def _encode_words(self, text: str) -> list[int]:
        """Returns all ids of one text in `tokenizer(texts)`, without start and end token."""
        return self.encode(text)

    def __call__(
        self, texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "T W"], Bool[np.ndarray, "T W"]]:
        """Returns the ids of T texts, padded, and their mask, True from the first to the end token.

        Longer texts are truncated before their end token.
        """
        shape = len(texts), self.max_words
        ids_TxW, mask_TxW = np.empty(shape, np.int32), np.empty(shape, bool)
        for row, text in enumerate(texts):
            ids_TxW[row], mask_TxW[row], _ = self.encode_padded(text)
        return ids_TxW, mask_TxW

    def encode_padded(
        self, text: str
    ) -> tuple[Int32[np.ndarray, " W"], Bool[np.ndarray, " W"], bool]:
        """Returns the ids and mask of one text, and True if it was truncated."""
        words = self._encode_words(text)
        num_starts, num_ends = self.special_tokens
        ids = [self.start] * num_starts + words[: self.num_words] + [self.end] * num_ends
        ids_W = np.full(self.max_words, self.pad, np.int32)
        ids_W[: len(ids)] = ids
        return ids_W, np.arange(self.max_words) < len(ids), len(words) > self.num_words

    def is_truncated(self, text: str) -> bool:
        """Returns True if `text` is too long for max_words."""
        return len(self._encode_words(text)) > self.num_words

    @property
    def num_words(self) -> int:
        """Number of tokens of a text that fit besides the special ones."""
        return self.max_words - sum(self.special_tokens)
