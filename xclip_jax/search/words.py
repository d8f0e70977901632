"""Words of lines and queries, in the form in which they are compared."""

import unicodedata

import regex
import snowballstemmer

# Letters, digits, underscores and, unlike Python's `re`, the marks that Indic and Thai words have.
# Chinese and Japanese are written without spaces: each character is a word.
_IDEOGRAPH = r"\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}ー"
_LETTERS = rf"[\w--[{_IDEOGRAPH}]]+"
_WORDS = regex.compile(rf"[{_IDEOGRAPH}]\p{{M}}*|{_LETTERS}(?:'{_LETTERS})*", regex.VERSION1)
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ‛`´′", "'"))
# A straight quote inside a word or number is no quotation mark: 7" or 5'10".
_QUOTED = regex.compile(r'(?<!\w)"([^"]*)"(?!\w)|[“”„]([^“”„]*)[“”]|«([^«»]*)»|「([^「」]*)」')


# Common English words, which are not searched: articles, pronouns, prepositions, auxiliary verbs.
_COMMON = """
a about after again against all am an and any are as at be because been before being below between
both but by can could did do does doing down during each few for from further had has have having he
her here hers him his how i if in into is it its just me more most my no nor not now of off on once
only or other our out over own s same she should so some such t than that the their them then there
these they this those through to too under until up very was we were what when where which while who
whom why will with would you your
"""
STOP_WORDS = frozenset(_COMMON.split())
_stemmer = snowballstemmer.stemmer("english")


def terms(text: str) -> list[str]:
    """Returns the words of a text as Lance's full-text index compares them, without STOP_WORDS.

    They are in lower case, without the accents of Latin letters, English ones without endings.
    Parts that an apostrophe separates are words.
    """
    words = [word for word in normalize(text).replace("'", " ").split() if word not in STOP_WORDS]
    return [_stemmer.stemWord(_fold(word)) for word in words]


def _fold(word: str) -> str:
    """Returns a word without accents if only Latin letters are left."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))
    return plain if plain.isascii() else word


def normalize(text: str) -> str:
    """Returns the words of a text, separated and surrounded by single spaces, " " without any.

    Text is in Unicode's form NFKC, case-folded, without invisible characters. An apostrophe inside
    a word belongs to it ("don't"), other punctuation does not. A phrase occurs in a text if its
    normalized form is a substring of that of the text.
    """
    # Before NFKC, which would replace the accent ´ by a space.
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).casefold()
    # Folding may take a text out of this form, and ŉ contains an apostrophe.
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)
    text = "".join(c for c in text if c.isascii() or unicodedata.category(c) != "Cf")
    words = _WORDS.findall(text)
    return f" {' '.join(words)} " if words else " "


def parse_query(text: str) -> tuple[str, list[str]]:
    """Splits a query into its text without quoted phrases, and these phrases in order.

    Quotation marks are "straight", “curly”, „low“, «angled» and 「corner」 ones. One without its
    counterpart is part of the text, and so is a pair without a word in it.
    """
    phrases: list[str] = []

    def take(match: regex.Match[str]) -> str:
        phrase = " ".join("".join(filter(None, match.groups())).split())
        if not normalize(phrase).strip():
            return match[0]
        phrases.append(phrase)
        return " "

    rest = _QUOTED.sub(take, text)
    return " ".join(rest.split()), phrases
