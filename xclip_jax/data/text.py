"""CLIP's byte-level BPE: cleaning, ids with start and end tokens, learning one from captions.

Ids follow https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py.
"""

import gzip
import html
import json
import os
import zlib
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import ftfy
import numpy as np
from huggingface_hub import snapshot_download
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTokenizer

from xclip_jax.cli import InputError

HUB_FILES = ("tokenizer*.json", "vocab.json", "merges.txt", "*_tokens*.json")
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_MERGES = 48894  # of OpenAI's vocabulary file, which lists more: 49,408 tokens


def clean(text):
    """CLIP's cleaning: mended Unicode, HTML entities resolved, single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class Tokenizer:
    """Text -> token ids of at most `max_words` positions."""

    def __init__(self, backend, max_words=77):
        self._backend = backend
        self.max_words = max_words
        self.start, self.end = backend.convert_tokens_to_ids([START, END])

    @property
    def vocab_size(self):
        """Number of ids, 0 to vocab_size - 1."""
        return len(self._backend)

    def encode(self, text):
        """All ids of one text, cleaned; no start or end token, never truncated."""
        return self._backend.backend_tokenizer.encode(clean(text), add_special_tokens=False).ids

    def tokens(self, text):
        """The tokens of `encode` as readable text, one string an id."""
        pieces = self._backend.convert_ids_to_tokens(self.encode(text))
        to_string = self._backend.convert_tokens_to_string
        return [to_string([piece]).removesuffix("</w>").strip() for piece in pieces]

    def __call__(self, texts):
        """Ids and mask of T texts.

        Returns:
            (ids_TxW, mask_TxW): int32, start and end token included, padded with 0; bool, True from
            the start to the end token. A longer text is cut, its end token kept: see `truncated`.
        """
        ids_TxW = np.zeros((len(texts), self.max_words), np.int32)
        mask_TxW = np.zeros((len(texts), self.max_words), bool)
        for row, text in enumerate(texts):
            ids = [self.start, *self.encode(text)[: self.max_words - 2], self.end]
            ids_TxW[row, : len(ids)] = ids
            mask_TxW[row, : len(ids)] = True
        return ids_TxW, mask_TxW

    def truncated(self, text):
        """Whether `text` is too long for max_words."""
        return len(self.encode(text)) > self.max_words - 2

    def save(self, folder):
        """Writes a folder in Hugging Face layout, which `load_tokenizer` reads."""
        self._backend.save_pretrained(folder)


def load_tokenizer(path_or_hub_id, max_words=77):
    """A CLIP tokenizer from a folder in Hugging Face layout, from the hub, or from OpenAI's file.

    Args:
        path_or_hub_id: a folder; else a file such as bpe_simple_vocab_16e6.txt.gz, packed or not;
            else a name on the Hugging Face hub.

    Raises:
        InputError: there is no tokenizer there.
    """
    folder = Path(path_or_hub_id)
    try:
        if folder.is_file():
            return _from_merges(_read_merges(folder), max_words)
        if not folder.is_dir():
            folder = _from_hub(str(path_or_hub_id))
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise OSError("it holds neither tokenizer.json nor vocab.json")
        backend = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer = Tokenizer(backend, max_words)
        tokenizer.encode("!")  # raises if the vocabulary is not CLIP's kind
    except Exception as error:  # whatever a damaged folder or a missing network raises
        raise InputError(f"no tokenizer in {path_or_hub_id}: {_first_line(error)}") from None
    return tokenizer


def _from_hub(hub_id):
    """The folder of a hub repository's tokenizer files, downloaded unless cached.

    One request for all: CLIPTokenizer.from_pretrained asks for each file by itself, and where there
    is no network tries each again for half a minute.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:
        reason = f"no such file or folder, nor one of the Hugging Face hub: {_first_line(error)}"
        raise OSError(reason) from None


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _read_merges(path):
    """Pairs of tokens of a vocabulary file of OpenAI's: a header line, then a merge a line.

    Raises:
        OSError: it is not such a file.
    """
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode()
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError):
        raise OSError("the file is damaged or no vocabulary file") from None
    header, *lines = text.rstrip().splitlines() or [""]
    known = set(_byte_tokens())
    if not lines or _is_merge(header.split(), known):
        raise OSError("the file has no merges below a header line")
    merges = []
    for number, line in enumerate(lines[:MAX_MERGES], 2):
        pair = tuple(line.split())
        if not _is_merge(pair, known):
            raise OSError(f"line {number} of the file makes no new token of two known by then")
        known.add("".join(pair))
        merges.append(pair)
    return merges


def _is_merge(pair, known):
    """Whether `pair` makes a new token of two known ones."""
    return len(pair) == 2 and known.issuperset(pair) and "".join(pair) not in known


def learn_tokenizer(texts, vocab_size=8192, max_words=77):
    """A tokenizer of CLIP's kind with merges learned from `texts`."""
    tokens = _byte_tokens()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        end_of_word_suffix="</w>",
        initial_alphabet=tokens[:256],
        special_tokens=tokens[256:],  # or it numbers them as they come, in another order each time
        show_progress=False,
    )
    learner = CLIPTokenizer().backend_tokenizer
    learner.train_from_iterator(map(clean, texts), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return _from_merges(merges, max_words)


def _from_merges(merges, max_words):
    """The tokenizer of these pairs of tokens, its vocabulary in CLIP's layout.

    That is 256 bytes, the same at the end of a word, the merged pairs, start, end: every text can
    be encoded.
    """
    merged = dict.fromkeys("".join(pair) for pair in merges)
    vocab = {token: index for index, token in enumerate([*_byte_tokens(), *merged, START, END])}
    return Tokenizer(CLIPTokenizer(vocab=vocab, merges=merges), max_words)


def _byte_tokens():
    """CLIP's 256 letters for bytes in the order of its ids, then the same at the end of a word.

    A printable byte is its own Latin-1 letter; those for the others start at U+0100, past them all.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*letters, *(letter + "</w>" for letter in letters)]
