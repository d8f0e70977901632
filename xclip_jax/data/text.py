"""Tokenizers: CLIP's byte-level BPE, loaded or learned from captions, and SigLIP 2's pieces.

CLIP's ids follow https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py. Pieces follow
Siglip2Tokenizer of https://github.com/huggingface/transformers, and with clean = "canonicalize"
src/open_clip/tokenizer.py of https://github.com/mlfoundations/open_clip.
"""

import gzip
import html
import json
import os
import re
import string
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import ftfy
import numpy as np
from ftfy.fixes import fix_surrogates
from huggingface_hub import snapshot_download
from jaxtyping import Bool, Int32
from tokenizers import Encoding, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import CLIPTokenizer

from xclip_jax import integrity
from xclip_jax.cli import InputError, PathLike, first_line, read_json

HUB_FILES = ["tokenizer*.json", "vocab.json", "merges.txt", "*_tokens*.json"]
START, END = "<|startoftext|>", "<|endoftext|>"
FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that show nothing
MAX_MERGES = 48894  # the rest of OpenAI's vocabulary file is not used: 49,408 tokens

Cleaning = Literal["lower", "canonicalize"]
RULES = "rules.json"  # of a PieceTokenizer: what tokenizer.json does not hold
PIECE_CLASSES = ("GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer")
SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model")
PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def clean(text: str) -> str:
    """Returns cleaned text: repaired Unicode, no HTML entities, single spaces, lower case."""
    return " ".join(_repair(text).split()).lower()


def canonicalize(text: str) -> str:
    """Returns a text cleaned as by `clean`, without ASCII punctuation, "_" replaced by a space."""
    return " ".join(_repair(text).translate(PUNCTUATION).lower().split())


def _repair(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def is_blank(text: str) -> bool:
    """Returns True if nothing visible is left of a text after cleaning."""
    if "&" in text or not (text.isascii() and text.isprintable()):  # cleaning removes something
        text = clean(text)
    return not any(
        unicodedata.category(letter)[0] in "LNPS" and letter not in FILLERS for letter in text
    )


class Tokenizer:
    """A converter of texts to at most `max_words` token ids, 0 to vocab_size - 1.

    `special_tokens` are the numbers of special tokens before and after the words of each text,
    `pad` is the id after them. `start` and `end` are the ids of the start and end token.
    """

    special_tokens: ClassVar[tuple[int, int]]
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
        ids_TxW = np.full((len(texts), self.max_words), self.pad, np.int32)
        mask_TxW = np.zeros((len(texts), self.max_words), bool)
        starts = [self.start] * self.special_tokens[0]
        for row, text in enumerate(texts):
            ids = [*starts, *self._encode_words(text)[: self.num_words], self.end]
            ids_TxW[row, : len(ids)] = ids
            mask_TxW[row, : len(ids)] = True
        return ids_TxW, mask_TxW

    def is_truncated(self, text: str) -> bool:
        """Returns True if `text` is too long for max_words."""
        return len(self._encode_words(text)) > self.num_words

    @property
    def num_words(self) -> int:
        """Number of tokens of a text that fit besides the special ones."""
        return self.max_words - sum(self.special_tokens)


class ClipTokenizer(Tokenizer):
    """CLIP's tokenizer: a start token, the text's, an end token, then 0."""

    special_tokens = (1, 1)
    pad = 0

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

    def _encode_words(self, text: str) -> list[int]:
        return self._plain.encode(clean(text), add_special_tokens=False).ids

    def tokens(self, text: str) -> list[str]:
        """Returns the tokens of a text in `tokenizer(texts)`, one readable string per id."""
        pieces = self._backend.convert_ids_to_tokens(self._encode_words(text))
        to_string = self._backend.convert_tokens_to_string
        return [to_string([piece]).removesuffix("</w>").strip() for piece in pieces]

    def save(self, folder: PathLike) -> None:
        """Writes a folder in Hugging Face layout, which `load_tokenizer` reads."""
        self._backend.save_pretrained(folder)


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

    def save(self, folder: PathLike) -> None:
        """Writes tokenizer.json and rules.json, which `load_tokenizer` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._serialized, "utf-8")
        rules = {"clean": self.clean, "pad": self.pad, "end": self.end}
        (folder / RULES).write_text(json.dumps(rules) + "\n")


def _readable(piece: str) -> str:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        letter = chr(int(piece[3:5], 16))
        return letter if "!" <= letter <= "~" else piece
    return piece.replace("\u2581", " ").strip() or "\u2581"


def load_tokenizer(
    path_or_hub_id: PathLike, max_words: int = 77, *, clean: Cleaning | None = None
) -> Tokenizer:
    """Loads a tokenizer with W = `max_words` positions, or raises InputError.

    It is in a folder in Hugging Face layout or on the Hugging Face hub: CLIP's, or SigLIP 2's
    pieces. CLIP's may also be in a file such as bpe_simple_vocab_16e6.txt.gz, compressed or not.
    `clean` replaces the saved cleaning of texts for pieces, "lower" if none is saved. CLIP's has
    only one.
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
            raise OSError(_explain_missing(folder))
        if _has_pieces(folder):
            return _load_pieces(folder, max_words, clean)
        backend = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer = ClipTokenizer(backend, max_words)
        tokenizer.encode("!")  # raises if the vocabulary is not of CLIP's type
    except Exception as error:  # many types, from a corrupted folder to no network
        raise InputError(f"no tokenizer in {path_or_hub_id}: {first_line(error)}") from None
    return tokenizer


def _explain_missing(folder: Path) -> str:
    for name in SENTENCEPIECE_FILES:
        if (folder / name).is_file():
            origin = "download it from the model's repository on the Hugging Face hub"
            return f"it contains {name}, but no tokenizer.json: {origin}"
    return "it contains neither tokenizer.json nor vocab.json"


def _has_pieces(folder: Path) -> bool:
    """Returns True if a folder holds the pieces of SigLIP 2, False if CLIP's vocabulary."""
    if (folder / RULES).is_file():
        return True
    config, file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if config.is_file() and read_json(config).get("tokenizer_class") in PIECE_CLASSES:
        return True
    model = json.loads(file.read_text("utf-8")).get("model", {}) if file.is_file() else {}
    is_bytewise = model.get("type") == "BPE" and model.get("byte_fallback") is True
    return is_bytewise and START not in model.get("vocab", {})


def _load_pieces(folder: Path, max_words: int, clean: Cleaning | None) -> PieceTokenizer:
    path = folder / RULES
    rules = read_json(path) if path.is_file() else {"clean": "lower", "pad": None, "end": None}
    if not isinstance(rules, dict) or rules.keys() != {"clean", "pad", "end"}:
        raise InputError(f"{RULES} does not hold exactly clean, pad and end")
    rules |= {"clean": clean} if clean else {}
    types = {type(rules["pad"]), type(rules["end"])}
    if rules["clean"] not in get_args(Cleaning) or not types <= {int, type(None)}:
        raise InputError(f"{rules}: clean must be one of {get_args(Cleaning)}, pad and end ids")
    return PieceTokenizer((folder / "tokenizer.json").read_text("utf-8"), max_words, **rules)


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
    return ClipTokenizer(CLIPTokenizer(vocab=vocab, merges=merges), max_words)


def _byte_tokens() -> list[str]:
    """Returns CLIP's 256 characters for bytes in order of id, then each with "</w>" appended."""
    # A printable byte is its Latin-1 character; those of the others start at U+0100.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*letters, *(letter + "</w>" for letter in letters)]
