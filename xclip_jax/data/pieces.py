"""Tokenizers of pieces that include spaces: SigLIP 2's and VideoPrism's.

Those of SigLIP 2 follow Siglip2Tokenizer of https://github.com/huggingface/transformers, and with
clean = "canonicalize" src/open_clip/tokenizer.py of https://github.com/mlfoundations/open_clip.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ftfy.fixes import fix_surrogates
from sentencepiece import SentencePieceProcessor
from tokenizers import Encoding, normalizers
from tokenizers import Tokenizer as BackendTokenizer

from xclip_jax.cli import InputError, PathLike
from xclip_jax.data.tokenizer import Tokenizer, canonicalize, group_pieces, to_sentence

Cleaning = Literal["lower", "canonicalize"]
RULES = "rules.json"  # of a PieceTokenizer: what tokenizer.json does not hold
SENTENCEPIECE = "sentencepiece.model"


class PieceTokenizer(Tokenizer):
    """SigLIP 2's tokenizer: the pieces of a text, spaces included, an end token, then `pad`.

    No start token is added: `start` is the id of "<bos>". A text that spells a special token gets
    its id, as in the original code: the model reads a text at its last position, not at its end.
    """

    special_tokens = (0, 1)

    def __init__(
        self,
        serialized: str,
        max_words: int = 64,
        *,
        clean: Cleaning = "lower",
        pad: int | None = None,
        end: int | None = None,
    ) -> None:
        """Creates a tokenizer from the content of its tokenizer.json, or raises InputError.

        `clean` is "lower", as in transformers, or "canonicalize", as in open_clip. `pad` and `end`
        are ids, by default of "<pad>" and "<eos>".
        """
        self._serialized, self.clean = serialized, clean
        self._backend = BackendTokenizer.from_str(serialized)
        self._backend.no_truncation()
        self._backend.no_padding()
        if clean == "lower":  # in the backend, which leaves special tokens out: "<EOS>" is a text
            normalizer = self._backend.normalizer
            steps = [normalizers.Lowercase(), *([] if normalizer is None else [normalizer])]
            self._backend.normalizer = normalizers.Sequence(steps)
        self.max_words, self.vocab_size = max_words, self._backend.get_vocab_size()
        self.start = self._find_id("<bos>", None)
        self.pad, self.end = self._find_id("<pad>", pad), self._find_id("<eos>", end)

    def _find_id(self, token: str, index: int | None) -> int:
        """Returns `index`, by default the id of `token`, or raises InputError if it is no id."""
        index = self._backend.token_to_id(token) if index is None else index
        if index is None or not 0 <= index < self.vocab_size:
            problem = f"the vocabulary of {self.vocab_size} tokens has no"
            raise InputError(f"{problem} {token}" if index is None else f"{problem} id {index}")
        return index

    def encode(self, text: str) -> list[int]:
        """Returns all ids of one text, cleaned, without end token."""
        return self._encode(text).ids

    def _encode(self, text: str) -> Encoding:
        # The backend rejects half a surrogate pair.
        fix = canonicalize if self.clean == "canonicalize" else fix_surrogates
        return self._backend.encode(fix(text), add_special_tokens=False)

    def tokens(self, text: str) -> list[str]:
        """Returns the tokens of a text in `tokenizer(texts)`, one readable string per id.

        White space is "\u2581", a byte that is no ASCII character is hexadecimal, as "<0xC3>".
        """
        return [_readable(piece) for piece in self._encode(text).tokens]

    def words(self, text: str) -> list[tuple[str, int]]:
        """Returns the words of a text in `tokenizer(texts)`, and the number of tokens of each."""
        return _join_words(self._encode(text).tokens)

    def save(self, folder: PathLike) -> None:
        """Writes tokenizer.json and rules.json, which `load_tokenizer` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._serialized, "utf-8")
        rules = {"clean": self.clean, "pad": self.pad, "end": self.end}
        (folder / RULES).write_text(json.dumps(rules) + "\n")


def _join_words(pieces: Sequence[str]) -> list[tuple[str, int]]:
    """Returns the words that pieces form, and the number of pieces of each."""
    groups = group_pieces(pieces, [piece.startswith("\u2581") for piece in pieces])
    texts = ["".join(filter("\u2581".__ne__, map(_readable, group))) for group in groups]
    return list(zip(texts, map(len, groups), strict=True))


def _readable(piece: str) -> str:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        letter = chr(int(piece[3:5], 16))
        return letter if "!" <= letter <= "~" else piece
    return piece.replace("\u2581", " ").strip() or "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """VideoPrism's tokenizer: the pieces of a text that ends with a full stop, then 0.

    A start token is added if the vocabulary has one.
    """

    pad = end = 0

    def __init__(self, serialized: bytes, max_words: int = 64) -> None:
        """Creates a tokenizer from the content of its sentencepiece.model, or raises InputError."""
        try:
            self._processor: Any = SentencePieceProcessor(model_proto=serialized)
        except RuntimeError:
            raise InputError("the file is corrupted or no model of SentencePiece") from None
        if not self._processor.vocab_size():
            raise InputError("the file is empty: no model of SentencePiece")
        self._serialized, self.max_words = serialized, max_words
        self.vocab_size, self.start = self._processor.vocab_size(), self._processor.bos_id()
        self.special_tokens = (int(self.start >= 0), 0)

    def encode(self, text: str) -> list[int]:
        """Returns all ids of one text, cleaned, without start token."""
        return self._processor.encode(to_sentence(fix_surrogates(text)))

    def tokens(self, text: str) -> list[str]:
        """Returns the tokens of a text in `tokenizer(texts)`, one readable string per id."""
        sentence = to_sentence(fix_surrogates(text))
        return [_readable(piece) for piece in self._processor.encode(sentence, out_type=str)]

    def words(self, text: str) -> list[tuple[str, int]]:
        """Returns the words of a text in `tokenizer(texts)`, and the number of tokens of each."""
        pieces = self._processor.encode(to_sentence(fix_surrogates(text)), out_type=str)
        return _join_words(pieces)

    def save(self, folder: PathLike) -> None:
        """Writes sentencepiece.model, which `load_tokenizer` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SENTENCEPIECE).write_bytes(self._serialized)
