"""Loads tokenizers: CLIP's byte-level BPE, which can also be learned from captions, and pieces.

CLIP's ids follow https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTokenizer

from xclip_jax import integrity
from xclip_jax.cli import InputError, PathLike, first_line, read_json
from xclip_jax.data.pieces import (
    RULES,
    SENTENCEPIECE,
    Cleaning,
    PieceTokenizer,
    SentencePieceTokenizer,
)
from xclip_jax.data.tokenizer import Tokenizer, clean, group_pieces

HUB_FILES = ["tokenizer*.json", "vocab.json", "merges.txt", "*_tokens*.json"]
HUB_FILES += [SENTENCEPIECE]
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_MERGES = 48894  # the rest of OpenAI's vocabulary file is not used: 49,408 tokens

PIECE_CLASSES = ("GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer")
SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model")


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

    def words(self, text: str) -> list[tuple[str, int]]:
        """Returns the words of a text in `tokenizer(texts)`, and the number of tokens of each."""
        pieces = self._backend.convert_ids_to_tokens(self._encode_words(text))
        ends = [piece.endswith("</w>") for piece in pieces]
        groups = group_pieces(pieces, [True, *ends[:-1]])
        to_string = self._backend.convert_tokens_to_string
        return [(to_string(group).removesuffix("</w>").strip(), len(group)) for group in groups]

    def save(self, folder: PathLike) -> None:
        """Writes a folder in Hugging Face layout, which `load_tokenizer` reads."""
        self._backend.save_pretrained(folder)


def load_tokenizer(
    path_or_hub_id: PathLike, max_words: int = 77, *, clean: Cleaning | None = None
) -> Tokenizer:
    """Loads a tokenizer with W = `max_words` positions, or raises InputError.

    It is in a folder in Hugging Face layout or on the Hugging Face hub: CLIP's, SigLIP 2's pieces
    or VideoPrism's sentencepiece.model. CLIP's may also be in a file such as
    bpe_simple_vocab_16e6.txt.gz, compressed or not, VideoPrism's in a file *.model.
    `clean` replaces the saved cleaning of texts for pieces, "lower" if none is saved. CLIP's has
    only one.
    """
    folder = Path(path_or_hub_id)
    try:
        if folder.is_file() and folder.suffix == ".model":
            return SentencePieceTokenizer(folder.read_bytes(), max_words)
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
        if (file := folder / SENTENCEPIECE).is_file():
            return SentencePieceTokenizer(file.read_bytes(), max_words)
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
