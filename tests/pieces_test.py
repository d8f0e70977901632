"""Tests of SigLIP 2's tokenizer: ids by hand and of the original code, rules, saving, loading."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers
from transformers import Siglip2Tokenizer

from xclip_jax.cli import InputError
from xclip_jax.data.pieces import PieceTokenizer
from xclip_jax.data.text import ClipTokenizer, learn_tokenizer, load_tokenizer
from xclip_jax.data.tokenizer import canonicalize

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDENS = SHARED / "goldens_encoders"
RULES = '{"clean": "lower", "pad": 0, "end": 1}'
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # the id of a byte is byte + 4
MERGES = [("d", "o"), ("do", "g"), ("▁", "dog"), ("r", "e"), ("re", "d"), ("▁", "red")]
A, SPACE, DOG, SPACE_DOG, SPACE_RED = 260, 266, 268, 269, 272


def backend():
    """Returns a tokenizer of Gemma's type: the letters of "a red dog" and six merges."""
    pieces = [*SPECIAL, *BYTES, *"adegor▁", *map("".join, MERGES)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = Backend(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.add_special_tokens(SPECIAL)
    return made


def write(folder, made=None, **config):
    """Writes the folder of a tokenizer as Hugging Face does, with a config if it is not empty."""
    folder.mkdir()
    (made or backend()).save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "source")


IDS = {
    "": [],
    "a dog": [A, SPACE_DOG],
    "dog": [DOG],  # no space is put before a text
    "A Dog RED": [A, SPACE_DOG, SPACE_RED],
    " a  dog ": [SPACE, A, SPACE, SPACE_DOG, SPACE],  # white space is kept
    "a\tb": [A, 4 + ord("\t"), 4 + ord("b")],
    "é": [4 + 0xC3, 4 + 0xA9],
    "É": [4 + 0xC3, 4 + 0xA9],
    "\ud83d": [4 + 0xEF, 4 + 0xBF, 4 + 0xBD],  # half a surrogate pair is U+FFFD
    "a!": [A, 4 + ord("!")],
    "a<eos>dog": [A, 1, DOG],
    "<pad><bos><unk>": [0, 2, 3],
}


def test_ids_equal_those_by_hand(folder):
    tokenizer = load_tokenizer(folder, 12)
    assert (tokenizer.vocab_size, tokenizer.max_words) == (273, 12)
    assert (tokenizer.pad, tokenizer.end, tokenizer.start) == (0, 1, 2)
    assert {text: tokenizer.encode(text) for text in IDS} == IDS


def test_special_token_in_upper_case_is_a_text(folder):
    ids = load_tokenizer(folder).encode("<EOS>")
    assert ids == [4 + ord("<"), 262, 264, 4 + ord("s"), 4 + ord(">")]


CANONICAL = {
    "A_red,  dog!": "a red dog",
    "don't <eos>": "dont eos",
    "half-open (3.14)": "halfopen 314",
    "?!": "",
    "\tA &amp; B\n": "a b",
    "“quoted” … ¿qué?": "quoted … ¿qué",  # punctuation beyond ASCII is kept
    "ΑΣ-Α ΟΣ.": "ασα ος",  # punctuation is gone before Σ gets its form at the end of a word
    "schÃ¶n\xa0x": "schön x",
}


def test_canonical_texts_have_no_ascii_punctuation(folder):
    assert {text: canonicalize(text) for text in CANONICAL} == CANONICAL
    tokenizer = load_tokenizer(folder, 5, clean="canonicalize")
    assert tokenizer.encode("A_red,  dog!") == [A, SPACE_RED, SPACE_DOG]
    assert tokenizer.encode("<eos>") == tokenizer.encode("eos") == [262, 264, 4 + ord("s")]
    assert tokenizer(["?!"])[0].tolist() == [[1, 0, 0, 0, 0]]


def test_texts_are_padded_and_truncated_before_the_end_token(folder):
    tokenizer = load_tokenizer(folder, 4)
    texts = ["a dog", "", "dogdogdog", "dogdogdoga", "a<pad>"]
    ids_TxW, mask_TxW = tokenizer(texts)
    assert (ids_TxW.dtype, mask_TxW.dtype) == (np.int32, np.bool_)
    assert ids_TxW.tolist() == [
        [A, SPACE_DOG, 1, 0],
        [1, 0, 0, 0],
        [DOG, DOG, DOG, 1],
        [DOG, DOG, DOG, 1],
        [A, 0, 1, 0],
    ]
    assert mask_TxW.astype(int).tolist() == [
        [1, 1, 1, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        [1, 1, 1, 0],
    ]
    assert [tokenizer.is_truncated(text) for text in texts] == [False, False, False, True, False]
    assert len(tokenizer.encode("dog" * 20)) == 20  # never cut
    assert tokenizer([])[0].shape == tokenizer([])[1].shape == (0, 4)


def test_numbers_of_special_tokens_match_the_ids(folder):
    pieces, clip = load_tokenizer(folder, 6), learn_tokenizer([], max_words=6)
    for tokenizer, numbers in ((pieces, (0, 1)), (clip, (1, 1))):
        assert tokenizer.special_tokens == numbers
        ids_TxW, mask_TxW = tokenizer(["dog"])
        words = tokenizer.encode("dog")
        start, stop = numbers[0], mask_TxW.sum() - numbers[1]
        assert ids_TxW[0, start:stop].tolist() == words


def test_tokens_are_readable_and_match_ids(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokens("A red  dog!é\t<eos>") == [
        *("a", "red", "▁", "dog", "!", "<0xC3>", "<0xA9>", "<0x09>", "<eos>")
    ]
    for text in IDS:
        assert len(tokenizer.tokens(text)) == len(tokenizer.encode(text))


def test_saved_truncation_and_padding_are_ignored(tmp_path):
    made = backend()
    made.enable_truncation(2)
    made.enable_padding(length=9)
    tokenizer = load_tokenizer(write(tmp_path / "source", made), 6)
    assert tokenizer.encode("dogdogdog") == [DOG] * 3
    assert tokenizer(["dogdogdog"])[0].tolist() == [[DOG, DOG, DOG, 1, 0, 0]]


@pytest.mark.parametrize("clean", ["lower", "canonicalize"])
def test_loaded_tokenizer_equals_the_saved_one(clean, folder, tmp_path):
    source = (folder / "tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(folder, 7, clean=clean)
    tokenizer.save(tmp_path / "new" / "a")
    assert (tmp_path / "new" / "a" / "tokenizer.json").read_bytes() == source
    rules = json.loads((tmp_path / "new" / "a" / "rules.json").read_text())
    assert rules == {"clean": clean, "pad": 0, "end": 1}
    texts = [*IDS, *CANONICAL]
    for loaded in (
        load_tokenizer(str(tmp_path / "new" / "a"), 7),
        pickle.loads(pickle.dumps(tokenizer)),  # the input pipeline's workers get a copy
    ):
        assert isinstance(loaded, PieceTokenizer)
        assert loaded.clean == clean
        for one, other in zip(loaded(texts), tokenizer(texts), strict=True):
            np.testing.assert_array_equal(one, other)


def test_argument_replaces_the_saved_cleaning(folder, tmp_path):
    load_tokenizer(folder, clean="canonicalize").save(tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").encode("a!") == [A]
    assert load_tokenizer(tmp_path / "a", clean="lower").encode("a!") == [A, 4 + ord("!")]


def test_rules_give_the_ids_of_padding_and_end(folder):
    (folder / "rules.json").write_text('{"clean": "lower", "pad": 3, "end": 2}')
    assert load_tokenizer(folder, 4)(["a"])[0].tolist() == [[A, 2, 3, 3]]


@pytest.mark.parametrize("name", ["GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer"])
def test_rules_class_or_model_decide_the_kind(name, tmp_path):
    made = backend()
    model = json.loads(made.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    made.model = models.BPE(model["vocab"], merges, unk_token="<unk>")  # no byte fallback
    loaded = load_tokenizer(write(tmp_path / "named", made, tokenizer_class=name))
    assert isinstance(loaded, PieceTokenizer)
    loaded = load_tokenizer(write(tmp_path / "other", tokenizer_class="PreTrainedTokenizerFast"))
    assert isinstance(loaded, PieceTokenizer)
    with pytest.raises(InputError, match="no tokenizer in "):
        load_tokenizer(write(tmp_path / "neither", made))
    (tmp_path / "neither" / "rules.json").write_text(RULES)
    assert isinstance(load_tokenizer(tmp_path / "neither"), PieceTokenizer)


def test_folder_of_clip_gives_clips_tokenizer(tmp_path):
    tokenizer = learn_tokenizer(["a dog"] * 3)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path, clean="canonicalize")
    assert isinstance(loaded, ClipTokenizer)
    assert loaded.encode("a dog!") == tokenizer.encode("a dog!")


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model"])
def test_sentencepiece_file_alone_is_an_error(name, tmp_path):
    (tmp_path / name).write_bytes(b"\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    reason = f"it contains {name}, but no tokenizer.json: download it from .* hub$"
    with pytest.raises(InputError, match=reason):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "does not hold exactly clean, pad and end"),
        (RULES.replace(', "end": 1', ""), "does not hold exactly clean, pad and end"),
        (RULES.replace('"lower"', '"upper"'), "clean must be one of .*'lower', 'canonicalize'"),
        (RULES.replace("0", '"0"'), "pad and end ids"),
        (RULES.replace("1", "true"), "pad and end ids"),
        (RULES.replace("1", "273"), "the vocabulary of 273 tokens has no id 273"),
        (RULES.replace("0", "-1"), "the vocabulary of 273 tokens has no id -1"),
    ],
)
def test_invalid_rules_are_errors(rules, reason, folder):
    (folder / "rules.json").write_text(RULES)
    load_tokenizer(folder)
    (folder / "rules.json").write_text(rules)
    with pytest.raises(InputError, match=f"^no tokenizer in {folder}: .*{reason}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("token", ["<pad>", "<eos>", "<bos>"])
def test_vocabulary_without_a_special_token_is_an_error(token, folder):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace(token, "<other>"), "utf-8")
    with pytest.raises(InputError, match=f"the vocabulary of 273 tokens has no {token}"):
        load_tokenizer(folder)


def test_corrupted_file_is_an_error(folder):
    (folder / "rules.json").write_text(RULES)
    data = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=f"no tokenizer in {folder}: "):
        load_tokenizer(folder)


def test_ids_equal_those_of_transformers(tmp_path):
    source = write(tmp_path / "source", tokenizer_class="Siglip2Tokenizer")
    original, tokenizer = Siglip2Tokenizer.from_pretrained(source), load_tokenizer(source, 8)
    texts = [text for text in [*IDS, *CANONICAL] if "\ud83d" not in text]
    texts += ["ΟΔΟΣ İ ẞ Ǆ", "<EOS> <eos>", "A\n\nB", "日本語 👩‍👩‍👧", "\x00\x1f\x7f"]
    for text in texts:
        assert tokenizer.encode(text) == original(text, add_special_tokens=False).input_ids


def test_ids_equal_the_goldens(tmp_path):
    if not GOLDENS.is_dir():
        pytest.skip(f"no goldens in {GOLDENS}")
    for name, key, clean in (
        ("siglip2_hf_a", "strings_ids_lowercased", "lower"),
        ("siglip2_open_clip_a", "strings_ids", "canonicalize"),
    ):
        expected = np.load(GOLDENS / name / "expected.npz")
        tokenizer = load_tokenizer(GOLDENS / name, 64, clean=clean)
        tokenizer.save(tmp_path / name)
        for loaded in (tokenizer, load_tokenizer(tmp_path / name, 64)):
            ids_TxW, mask_TxW = loaded(expected["strings"].tolist())
            np.testing.assert_array_equal(ids_TxW, expected[key])
            assert len(ids_TxW) == 20
            # A text may spell <eos> too: its end token is the last one.
            last = (ids_TxW == 1).cumsum(1).argmax(1)
            np.testing.assert_array_equal(mask_TxW.sum(1), last + 1)
            np.testing.assert_array_equal(
                loaded(expected["texts"].tolist())[0], expected["input_ids"]
            )


def test_clip_ids_equal_the_goldens():
    if not GOLDENS.is_dir():
        pytest.skip(f"no goldens in {GOLDENS}")
    expected = np.load(GOLDENS / "clip_tokenizer_ids_a" / "expected.npz")
    for size in (32, 72, 77):
        tokenizer = load_tokenizer(SHARED / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz", size)
        ids_TxW = tokenizer(expected["strings"].tolist())[0]
        assert len(ids_TxW) == 20
        np.testing.assert_array_equal(ids_TxW, expected[f"ids_{size}"])
