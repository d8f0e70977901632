"""CLIP's byte-level BPE tokenizer, loaded from files or learned from captions.

Ids follow https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py.
"""

import gzip
import html
import json
import os
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import ftfy
import numpy as np
from huggingface_hub import snapshot_download
from jaxtyping import Bool, Int32
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTokenizer

from xclip_jax import integrity
from xclip_jax.cli import InputError, PathLike, first_line

HUB_FILES = ["tokenizer*.json", "vocab.json", "merges.txt", "*_tokens*.json"]
START, END = "<|startoftext|>", "<|endoftext|>"
FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that show nothing
MAX_MERGES = 48894  # the rest of OpenAI's vocabulary file is not used: 49,408 tokens


def clean(text: str) -> str:
    """Returns cleaned text: repaired Unicode, no HTML entities, single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def is_blank(text: str) -> bool:
    """Returns True if nothing visible is left of a text after cleaning."""
    if "&" in text or not (text.isascii() and text.isprintable()):  # cleaning removes something
        text = clean(text)
    return not any(
        unicodedata.category(letter)[0] in "LNPS" and letter not in FILLERS for letter in text
    )


class Tokenizer:
    """A converter of texts to at most `max_words` token ids, 0 to vocab_size - 1."""

    def __init__(self, backend: Any, max_words: int = 77) -> None:
        self._backend = backend
        # The model reads a text at its end token, which "<|endoftext|>" in it must not become.
        self._plain = BackendTokenizer.from_str(backend.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self.max_words, self.vocab_size = max_words, len(backend)
        self.start, self.end = backend.convert_tokens_to_ids([START, END])

    def encode(self, text: str) -> list[int]:
        """Returns all ids of one text, cleaned, without start and end token.

        As in OpenAI's code, a text that spells a special token gets its id. In `tokenizer(texts)`
        it is a text like any other.
        """
        return self._backend.backend_tokenizer.encode(clean(text), add_special_tokens=False).ids

    def _encode_plain(self, text: str) -> list[int]:
        return self._plain.encode(clean(text), add_special_tokens=False).ids

    def tokens(self, text: str) -> list[str]:
        """Returns the tokens of a text in `tokenizer(texts)`, one readable string per id."""
        pieces = self._backend.convert_ids_to_tokens(self._encode_plain(text))
        to_string = self._backend.convert_tokens_to_string
        return [to_string([piece]).removesuffix("</w>").strip() for piece in pieces]

    def __call__(
        self, texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "T W"], Bool[np.ndarray, "T W"]]:
        """Returns the ids of T texts, padded with 0, and their mask, True from start to end token.

        Longer texts are truncated before their end token.
        """
        ids_TxW = np.zeros((len(texts), self.max_words), np.int32)
        mask_TxW = np.zeros((len(texts), self.max_words), bool)
        for row, text in enumerate(texts):
            ids = [self.start, *self._encode_plain(text)[: self.max_words - 2], self.end]
            ids_TxW[row, : len(ids)] = ids
            mask_TxW[row, : len(ids)] = True
        return ids_TxW, mask_TxW

    def is_truncated(self, text: str) -> bool:
        """Returns True if `text` is too long for max_words."""
        return len(self._encode_plain(text)) > self.max_words - 2

    def save(self, folder: PathLike) -> None:
        """Writes a folder in Hugging Face layout, which `load_tokenizer` reads."""
        self._backend.save_pretrained(folder)


def load_tokenizer(path_or_hub_id: PathLike, max_words: int = 77) -> Tokenizer:
    """Loads a CLIP tokenizer with W = `max_words` positions, or raises InputError.

    It is in a folder in Hugging Face layout, in a file such as bpe_simple_vocab_16e6.txt.gz,
    compressed or not, or on the Hugging Face hub.
    """
    folder = Path(path_or_hub_id)
    try:
        if folder.is_file():
            return _from_merges(_read_merges(folder), max_words)
        if not folder.is_dir():
            # CLIPTokenizer would, without a network, try each file for half a minute.
            try:
                folder = Path(snapshot_download(str(path_or_hub_id), allow_patterns=HUB_FILES))
            except Exception as error:
                problem = "no such file, folder or Hugging Face hub repository"
                raise OSError(f"{problem}: {first_line(error)}") from None
        if reason := integrity.find_corruption(folder):
            raise OSError(reason)
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise OSError("it contains neither tokenizer.json nor vocab.json")
        backend = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer = Tokenizer(backend, max_words)
        tokenizer.encode("!")  # raises if the vocabulary is not of CLIP's type
    except Exception as error:  # many types, from a corrupted folder to no network
        raise InputError(f"no tokenizer in {path_or_hub_id}: {first_line(error)}") from None
    return tokenizer


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Returns the merges of OpenAI's vocabulary file: a header, then a pair of tokens per line."""
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode()
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError):
        raise OSError("the file is corrupted or not a vocabulary file") from None
    lines = text.rstrip().splitlines()[: MAX_MERGES + 1]
    known, merges = set(_byte_tokens()), []
    for number, line in enumerate(lines, 1):
        pair = line.split()
        if len(pair) == 2 and known.issuperset(pair) and "".join(pair) not in known:
            known.add("".join(pair))
            merges.append((pair[0], pair[1]))
        elif number > 1:
            raise OSError(f"line {number} is not a new token made of two earlier tokens")
    if not merges or len(merges) == len(lines):
        raise OSError("the file has no merges below a header line")
    return merges


def learn_tokenizer(texts: Iterable[str], vocab_size: int = 8192, max_words: int = 77) -> Tokenizer:
    """Returns a CLIP tokenizer of at most `vocab_size` ids, with merges learned from `texts`."""
    tokens = _byte_tokens()
    # In the alphabet, tokens with "</w>" would be numbered in random order.
    options: Any = {"initial_alphabet": tokens[:256], "special_tokens": tokens[256:]}
    options |= {"end_of_word_suffix": "</w>", "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, min_frequency=2, **options)
    learner = CLIPTokenizer().backend_tokenizer
    learner.train_from_iterator(map(clean, texts), trainer)
    merges = [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]
    return _from_merges(merges, max_words)


def _from_merges(merges: Any, max_words: int) -> Tokenizer:
    """Returns the tokenizer of these merges, ids in CLIP's order: bytes, merges, start, end."""
    merged = dict.fromkeys("".join(pair) for pair in merges)
    vocab = {token: index for index, token in enumerate([*_byte_tokens(), *merged, START, END])}
    return Tokenizer(CLIPTokenizer(vocab=vocab, merges=merges), max_words)


def _byte_tokens() -> list[str]:
    """Returns CLIP's 256 characters for bytes in order of id, then each with "</w>" appended."""
    # A printable byte is its Latin-1 character; those of the others start at U+0100.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*letters, *(letter + "</w>" for letter in letters)]
