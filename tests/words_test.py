"""Tests of the words of lines and queries."""

import pytest

from xclip_jax.search.words import normalize, parse_query


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", " hello world "),
        ("Don’t stop -- it's 5 o'clock", " don't stop it's 5 o'clock "),
        ("'quoted' rock'n'roll '", " quoted rock'n'roll "),
        ("STRASSE straße", " strasse strasse "),
        ("ﬁne ①②  Ｗｉｄｅ", " fine 12 wide "),
        ("cafe\u0301 CAFÉ", " café café "),
        ("北京 is 東京タワー3", " 北 京 is 東 京 タ ワ ー 3 "),
        ("か\u3099す", " が す "),
        ("हिन्दी ไม้ 한국어", " हिन्दी ไม้ 한국어 "),
        ("co\u00adope\u200brate", " cooperate "),
        ("snake_case e-mail", " snake_case e mail "),
        ("", " "),
        ("?!", " "),
    ],
)
def test_words_are_normalized(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    "text", ["Don’t", "ǰ\u0345", "ΐ ﬃ Å", "北京 3'4", "i̇stanbul İ", "ŉ", "\u0390\u0301"]
)
def test_normalizing_again_changes_nothing(text):
    assert normalize(normalize(text)) == normalize(text)


def test_phrase_occurs_as_whole_words_only():
    text = normalize("The fire alarm, they said: “Fire!”")
    assert normalize("FIRE alarm") in text
    assert normalize("said fire") in text
    assert normalize("larm") not in text
    assert normalize("京都") in normalize("東京都")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("a red car", ("a red car", [])),
        ('a man says "good morning" twice', ("a man says twice", ["good morning"])),
        ('"exit" "no way" door', ("door", ["exit", "no way"])),
        ("“a” and „b“ and «c» 「出口」 d", ("and and d", ["a", "b", "c", "出口"])),
        ("”utgång” sign", ("sign", ["utgång"])),
        ('an open "quote', ('an open "quote', [])),
        ('a 7" screen and a 5" disk', ('a 7" screen and a 5" disk', [])),
        ('nothing "" or " ! " here', ('nothing "" or " ! " here', [])),
        ("it's the dog's 'bowl'", ("it's the dog's 'bowl'", [])),
        ("", ("", [])),
    ],
)
def test_quoted_phrases_are_split_off(query, expected):
    assert parse_query(query) == expected


def test_many_quotes_are_parsed_in_little_time():
    rest, phrases = parse_query('"' * 100_001 + "“" * 100_000 + "a")
    assert phrases == []
    assert rest
