"""Tests of the tokenizer: CLIP's ids, arbitrary text, saving and loading."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from xclip_jax.cli import InputError
from xclip_jax.data import text as text_module
from xclip_jax.data.text import END, START, learn_tokenizer, load_tokenizer
from xclip_jax.data.tokenizer import clean, is_blank

CLIP_BPE = Path(__file__).resolve().parents[2] / "shared" / "clip_bpe"
CORPUS = [
    "A dog runs after the red ball",
    "the red dog sits; the blue dog doesn't",
    "two people are running towards the dog's house",
    "a house, two houses and a red ball",
] * 3
STRINGS = [
    "",
    "a dog",
    "Zebra QUARTZ 0123456789",
    "naïve café — piñata, straße",
    "日本語のテスト عربى мир",
    "👩‍👩‍👧 😀 \U0010ffff \x00\x01\x7f\x80\xff",
    "it's we'll I've they're I'm he'd don't",
    "!!!...??? @user #tag http://a.b/c?d=e&f=g",
    "".join(map(chr, range(0x100, 0x250))),
    "\ufeffbom \u200bzero \u2028line",
]


def alphabet():
    """Returns CLIP's letter for each byte. Printable bytes are their own letters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }


@pytest.fixture(scope="module")
def tokenizer():
    return learn_tokenizer(CORPUS, max_words=12)


def vocabulary(tokenizer, folder):
    """Returns its tokens in the order of their ids."""
    tokenizer.save(folder)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(tokenizer.vocab_size))
    return sorted(vocab, key=vocab.get)


def test_vocabulary_is_in_clips_order(tokenizer, tmp_path):
    tokens = vocabulary(tokenizer, tmp_path)
    letters = [letter for _, letter in alphabet().items()]
    assert tokens[:256] == letters
    assert tokens[256:512] == [letter + "</w>" for letter in letters]
    assert tokens[-2:] == [START, END]
    assert (tokenizer.start, tokenizer.end) == (len(tokens) - 2, len(tokens) - 1)
    assert {"dog</w>", "the</w>", "red</w>"} <= set(tokens[512:-2])
    assert tokenizer.vocab_size == len(tokens)
    assert all(len(token.removesuffix("</w>")) > 1 for token in tokens[512:-2])


def test_any_text_can_be_encoded_and_decoded(tokenizer, tmp_path):
    tokens = vocabulary(tokenizer, tmp_path)
    byte_of = {letter: byte for byte, letter in alphabet().items()}
    for string in STRINGS:
        joined = "".join(tokens[index] for index in tokenizer.encode(string))
        data = bytes(byte_of[letter] for letter in joined.replace("</w>", ""))
        assert data.decode() == "".join(clean(string).split())


def test_encoding_uses_learned_merges(tokenizer):
    assert len(tokenizer.encode("the red dog")) == 3
    assert len(tokenizer.encode("THE  Red\ndog")) == 3
    assert len(tokenizer.encode("zzz")) == 3


@pytest.mark.parametrize("special", [START, END])
def test_special_token_in_a_text_is_a_text_like_any_other(tokenizer, special):
    ids_TxW, mask_TxW = learn_tokenizer(CORPUS)([f"a dog {special} red"])
    ids = ids_TxW[0][mask_TxW[0]].tolist()
    assert (ids.count(tokenizer.start), ids.count(tokenizer.end)) == (1, 1)
    assert (ids[0], ids[-1]) == (tokenizer.start, tokenizer.end)
    assert len(ids) > 5


@pytest.mark.parametrize("text", ["", " \n", "&nbsp;", "\0", "\u200b\ufeff", "\x1b[31m", "\u3164"])
def test_text_that_shows_nothing_is_blank(text):
    assert is_blank(text)


@pytest.mark.parametrize("text", ["a", "!", "7", "😀", "日", "&amp;", "\u200ba", "\x1b[31ma"])
def test_text_that_shows_something_is_not_blank(text):
    assert not is_blank(text)


# 512 words of three letters, each as frequent as the others: ties everywhere.
TIES = [f"{a}{b}{c} word" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"] * 2


def test_vocabulary_has_at_most_the_requested_size(tmp_path):
    tokenizer = learn_tokenizer(TIES, vocab_size=600)
    assert tokenizer.vocab_size == 600
    assert len(vocabulary(tokenizer, tmp_path)) == tokenizer.vocab_size


def test_merges_are_learned_from_cleaned_texts(tmp_path):
    tokens = vocabulary(learn_tokenizer(["dogs &amp; cats", "a &lt; b"] * 3), tmp_path)
    assert "dogs</w>" in tokens
    assert not {"am", "amp</w>", "lt</w>"} & set(tokens)


def test_learning_from_no_text_gives_a_byte_vocabulary():
    tokenizer = learn_tokenizer([])
    assert tokenizer.vocab_size == 514
    assert len(tokenizer.encode("hi")) == 2


def test_learning_is_deterministic(tmp_path):
    for name in ("a", "b"):
        learn_tokenizer(iter(CORPUS + TIES)).save(tmp_path / name)
    one, other = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b"))
    assert one == other


def test_loaded_tokenizer_equals_the_saved_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    loaded = load_tokenizer(str(tmp_path / "a"), max_words=12)
    assert (loaded.start, loaded.end) == (tokenizer.start, tokenizer.end)
    assert loaded.vocab_size == tokenizer.vocab_size
    for string in STRINGS + CORPUS:
        assert loaded.encode(string) == tokenizer.encode(string)
    for one, other in zip(loaded(STRINGS), tokenizer(STRINGS), strict=True):
        np.testing.assert_array_equal(one, other)
    loaded.save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").encode("the red dog") == tokenizer.encode("the red dog")
    assert load_tokenizer(tmp_path / "b").max_words == 77


def test_ids_and_mask_of_short_and_long_texts(tokenizer):
    short, exact, long = "the red dog", "dog " * 10, "dog " * 11 + "ball"
    ids_TxW, mask_TxW = tokenizer([short, "", exact, long])
    assert (ids_TxW.dtype, ids_TxW.shape) == (np.int32, (4, 12))
    assert (mask_TxW.dtype, mask_TxW.shape) == (np.bool_, (4, 12))
    dog, ball = tokenizer.encode("dog ball")
    start, end = tokenizer.start, tokenizer.end
    assert ids_TxW.tolist() == [
        [start, *tokenizer.encode(short), end, *[0] * 7],
        [start, end, *[0] * 10],
        [start, *[dog] * 10, end],
        [start, *[dog] * 10, end],
    ]
    assert mask_TxW.sum(1).tolist() == [5, 2, 12, 12]
    assert (np.diff(mask_TxW.astype(int)) <= 0).all()
    assert ball not in ids_TxW
    assert [tokenizer.is_truncated(t) for t in (short, "", exact, long)] == [
        False,
        False,
        False,
        True,
    ]
    assert len(tokenizer.encode(long)) == 12  # never cut


def test_no_texts_give_empty_arrays(tokenizer):
    ids_TxW, mask_TxW = tokenizer([])
    assert ids_TxW.shape == mask_TxW.shape == (0, 12)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" a\tB\nc  D ", "a b c d"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("a<b &amp;amp; c", "a<b & c"),  # ftfy leaves entities alone where there are tags
        ("schÃ¶n", "schön"),
        ("“x” ﬁne", '"x" fine'),
        ("a\xa0b", "a b"),
        ("cafe\u0301", "café"),
        ("\ud83d half", "\ufffd half"),
    ],
)
def test_texts_are_cleaned_as_by_clip(text, cleaned):
    assert clean(text) == cleaned


def test_tokens_are_readable_and_match_ids(tokenizer):
    assert tokenizer.tokens("The red dog's ball") == ["the", "red", "dog", "'s", "ball"]
    assert tokenizer.tokens("zé") == ["z", "\ufffd", "\ufffd"]  # é is two bytes, no merge
    for string in STRINGS:
        assert len(tokenizer.tokens(string)) == len(tokenizer.encode(string))
        assert not any("</w>" in token for token in tokenizer.tokens(string))


def corrupt(folder, how):
    if how == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "cut":
        data = (folder / "tokenizer.json").read_bytes()
        (folder / "tokenizer.json").write_bytes(data[: len(data) // 2])
    elif how == "empty file":
        (folder / "tokenizer.json").write_text("")
    elif how == "other JSON":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "config":
        (folder / "tokenizer_config.json").write_text("{")
    elif how == "other kind":
        Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(
            str(folder / "tokenizer.json")
        )
    elif how == "half of two":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text('{"a": 0}')


CORRUPTIONS = (
    "empty folder",
    "cut",
    "empty file",
    "other JSON",
    "config",
    "other kind",
    "half of two",
)


@pytest.mark.parametrize("how", CORRUPTIONS)
def test_corrupted_folders_are_errors(tokenizer, tmp_path, how):
    folder = tmp_path / "a"
    tokenizer.save(folder)
    load_tokenizer(folder)
    corrupt(folder, how)
    with pytest.raises(InputError) as error:
        load_tokenizer(folder)
    assert str(error.value).startswith(f"no tokenizer in {folder}: ")
    assert "\n" not in str(error.value)


def test_missing_folders_are_errors(tmp_path):
    for path in (tmp_path / "none", "data/mine/tokenizer"):
        with pytest.raises(InputError) as error:
            load_tokenizer(path)
        assert str(error.value).startswith(f"no tokenizer in {path}: no such file, folder or ")
        assert "\n" not in str(error.value)


def test_tokenizer_is_loaded_from_the_hub(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    requests = []

    def snapshot_download(hub_id, allow_patterns):
        if requests:
            raise ConnectionError("no network\nat all")
        requests.append((hub_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(text_module, "snapshot_download", snapshot_download)
    assert load_tokenizer("openai/clip").encode("a dog") == tokenizer.encode("a dog")
    assert requests[0][0] == "openai/clip"
    reason = "no such file, folder or Hugging Face hub repository: no network"
    with pytest.raises(InputError, match=f"^no tokenizer in openai/clip: {reason}$"):
        load_tokenizer("openai/clip")


# A vocabulary file of five merges. 512 ids of bytes come before them.
MADE_UP = "#made up: 1\nt h\nth e</w>\nd o\ndo g</w>\nÃ ©</w>\n"
# By hand: byte 33 is id 0, 161 is 94, 174 is 106; then those without a letter, of which 0 is 188,
# 127 is 221 and 173 is 255; 256 more for each at the end of a word.
MADE_UP_IDS = {
    "The  DOG": [513, 515],
    "dogs": [514, ord("g") - 33, 256 + ord("s") - 33],
    "thé!": [512, 516, 256],
    "thée": [512, 106 + 0xC3 - 174, 94 + 0xA9 - 161, 256 + ord("e") - 33],
    "日": [106 + 0xE6 - 174, 221 + 0x97 - 127, 94 + 0xA5 - 161 + 256],
    "\u00adx ~": [106 + 0xC2 - 174, 255 + 256, 256 + ord("x") - 33, 256 + 93],
    f"{START}dog{END}": [517, 515, 518],
}


def vocabulary_file(path, text):
    """Writes `text` to `path`, compressed if its name ends in .gz."""
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["bpe.txt.gz", "bpe.txt"])
def test_vocabulary_file_gives_the_expected_ids(name, tmp_path):
    path = vocabulary_file(tmp_path / name, MADE_UP)
    for tokenizer in (load_tokenizer(path, 5), load_tokenizer(str(path), max_words=5)):
        assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (519, 517, 518)
        assert {text: tokenizer.encode(text) for text in MADE_UP_IDS} == MADE_UP_IDS
    assert tokenizer(["the dog the dog"])[0].tolist() == [[517, 513, 515, 513, 518]]
    tokenizer.save(tmp_path / "folder")
    loaded = load_tokenizer(tmp_path / "folder")
    assert (loaded.vocab_size, loaded.start, loaded.end) == (519, 517, 518)
    assert {text: loaded.encode(text) for text in MADE_UP_IDS} == MADE_UP_IDS


@pytest.mark.parametrize(
    "text", [MADE_UP.replace("\n", "\r\n"), MADE_UP.rstrip(), MADE_UP + "\n\n"]
)
def test_vocabulary_file_may_have_any_line_ends(text, tmp_path):
    tokenizer = load_tokenizer(vocabulary_file(tmp_path / "bpe.txt", text))
    assert tokenizer.vocab_size == 519
    assert tokenizer.encode("the dog") == [513, 515]


def test_learned_merges_as_vocabulary_file_give_the_same_ids(tokenizer, tmp_path):
    """Writes learned merges in the format of OpenAI's file."""
    tokenizer.save(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    lines = "\n".join(["#learned", *map(" ".join, merges)])
    loaded = load_tokenizer(vocabulary_file(tmp_path / "bpe.txt.gz", lines))
    assert loaded.vocab_size == tokenizer.vocab_size
    for string in STRINGS + CORPUS:
        assert loaded.encode(string) == tokenizer.encode(string)


def test_merges_beyond_openais_number_are_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "MAX_MERGES", 3)
    text = "".join(MADE_UP.splitlines(keepends=True)[:4]) + "what follows is not read\n" * 3
    assert load_tokenizer(vocabulary_file(tmp_path / "bpe.txt", text)).end == 512 + 3 + 1


NO_MERGES = "the file has no merges below a header line"
CORRUPTED = "the file is corrupted or not a vocabulary file"
PROSE = "A dog runs after the red ball.\nIt sits down by the fire.\nThe ball is lost.\n"
PACKED = gzip.compress(MADE_UP.encode() * 1000, mtime=0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PACKED[: len(PACKED) // 2], CORRUPTED),
        (PACKED[:12], CORRUPTED),
        (PACKED[:-4], CORRUPTED),
        (PACKED[:20] + b"\x00" * 9 + PACKED[29:], CORRUPTED),
        (b"\x1f\x8b and no more", CORRUPTED),
        (b"PK\x03\x04\xff\xfe", CORRUPTED),
        (b"", NO_MERGES),
        (gzip.compress(b"", mtime=0), NO_MERGES),
        (b"\n\n", NO_MERGES),
        (b"#version: 0.2\n", NO_MERGES),
        (b"A dog runs after the red ball.", NO_MERGES),
        (MADE_UP.partition("\n")[2].encode(), NO_MERGES),  # the header is gone: ids would be off
        (PROSE.encode(), "line 2 is not a new token made of two earlier tokens"),
        (PROSE.encode("utf-16"), CORRUPTED),
        (MADE_UP.replace("d o\n", "").encode(), "line 4 is not a new token"),
        (MADE_UP.replace("d o\n", "t h\n").encode(), "line 4 is not a new token"),
        (MADE_UP.replace("d o\n", "\n").encode(), "line 4 is not a new token"),
        ((MADE_UP + "th e</w> x").encode(), "line 7 is not a new token"),
        (b'{"model": {"vocab": {}}}\n{}\n', "line 2 is not a new token"),
    ],
)
def test_other_files_are_errors(data, reason, tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        load_tokenizer(path)
    assert str(error.value).startswith(f"no tokenizer in {path}: {reason}")
    assert "\n" not in str(error.value)


def test_ids_equal_openais(tmp_path):
    if not CLIP_BPE.is_dir():
        pytest.skip(f"no OpenAI vocabulary in {CLIP_BPE}")
    cases = json.loads((CLIP_BPE / "cases.json").read_text())["cases"]
    assert len(cases) == 179
    packed = CLIP_BPE / "bpe_simple_vocab_16e6.txt.gz"
    tokenizer = load_tokenizer(packed)
    tokenizer.save(tmp_path / "folder")
    plain = vocabulary_file(tmp_path / "bpe.txt", gzip.decompress(packed.read_bytes()).decode())
    for loaded in (tokenizer, load_tokenizer(plain), load_tokenizer(tmp_path / "folder")):
        assert (loaded.start, loaded.end, loaded.vocab_size) == (49406, 49407, 49408)
        assert [c["text"] for c in cases if loaded.encode(c["text"]) != c["ids"]] == []
