"""One form for the many spellings of a word: the readings of a text by which a list is looked up.

A reading is a list of words. Texts and entries of a list go through the same `fold`, so a list may
be in any script.
What no reading undoes: translation, base64 and other codes, synonyms, splitting a thought over
harmless words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module

from lidit.errors import InputError

EDITION = "1"  # counts up with whatever changes a reading
# Names of letters that are Latin under a mark, a stroke or a shape: LATIN SMALL LETTER F WITH HOOK.
LATIN = re.compile(
    r"(?:LATIN|REGIONAL INDICATOR).* LETTER (?:SMALL CAPITAL |OPEN |SCRIPT |DOTLESS |TURNED "
    r"|REVERSED )?"
    r"([A-Z])(?= WITH |$)"
)
# Where neither a name nor Unicode's table leads to the letter that people use the shape for.
SHAPES = {"ĸ": "k", "ε": "e", "є": "e", "ꞓ": "e", "€": "e"}
LEET = str.maketrans(
    {"0": "o", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g", "@": "a", "$": "s"}
)
# These stand for two letters each, so there are two readings.
STROKES = [str.maketrans(dict.fromkeys("1!|", letter)) for letter in "il"]
LEET_CHARACTERS = frozenset("0345789@$1!|")
WORD = re.compile(r"[^\W_]+")
# Single letters with something between them: b a d, b.a.d, b_a_d.
SPELLED = re.compile(r"(?<![^\W_])(?:[^\W_][\W_]+){2,}[^\W_](?![^\W_])")
LONG_RUN = re.compile(r"(.)\1{2,}")
TURNED = re.compile("[\u202e\u202d\u2067]([^\u202c\u2069\n]*)")


def fold(text: str) -> str:
    """The text in small Latin letters where its characters are or look like Latin ones, without
    marks or what is invisible.
    """
    return "".join(map(_folded, unicodedata.normalize("NFKC", text)))


def words(folded: str) -> list[str]:
    return WORD.findall(folded)


def readings(text: str) -> Iterator[list[str]]:
    """Every way in which the text's words may be meant, most literal first."""
    for spelled in _spellings(text):
        yield words(spelled)
        # Marks within a word: bad-word, b*a*d. The spaces stay, so no words are run together.
        yield ["".join(words(part)) for part in spelled.split()]
        for kept in (r"\1", r"\1\1"):
            yield words(LONG_RUN.sub(kept, spelled))


def spelled_out(text: str) -> Iterator[str]:
    """Runs of three and more single letters, each run as one word: nobody writes like that by
    chance. A letter at either end may be a word of its own ("a b a d"), so an entry is looked for
    within the run.
    """
    for spelled in _spellings(text):
        for run in SPELLED.findall(spelled):
            joined = "".join(words(run))
            yield from {joined, *(_letters(joined, strokes) for strokes in STROKES)}


def squeezed(text: str) -> Iterator[str]:
    """The text without anything but letters and digits: words may be found across the borders of
    others.
    """
    for spelled in _spellings(text):
        yield "".join(words(spelled))


def _spellings(text: str) -> list[str]:
    """The folded text, also with signs read as letters, and the same of what is shown from right to
    left.
    """
    directions = [text, *(turned[::-1] for turned in TURNED.findall(text))]
    folded = list(map(fold, directions))
    return list(
        dict.fromkeys([*folded, *(spelled for one in folded for spelled in _without_leet(one))])
    )


def _without_leet(folded: str) -> list[str]:
    """Digits and signs read as letters, in words that have a letter: 455 stays a number."""
    return [
        "".join(_letters(part, strokes) for part in re.split(r"(\s+)", folded))
        for strokes in STROKES
    ]


def _letters(word: str, strokes: dict[int, str]) -> str:
    if LEET_CHARACTERS.isdisjoint(word) or not any(map(str.isalpha, word)):
        return word
    return word.translate(LEET).translate(strokes)


@lru_cache(maxsize=1 << 16)
def _folded(character: str) -> str:
    """A character of a text in NFKC: as Latin letters, as it is, or as nothing."""
    if character.isascii():
        return character.lower()
    bare = _bare(character)
    if not bare or bare.isascii():
        return bare
    for look in (bare, character):
        for alike in [look, *_lookalikes().get(look, ())]:
            if letter := _latin(alike):
                return letter
    return bare


def _bare(text: str) -> str:
    """In small letters, without marks and without characters that are not seen."""
    parts = unicodedata.normalize("NFKD", text.casefold())
    return "".join(part for part in parts if unicodedata.category(part) not in ("Mn", "Me", "Cf"))


def _latin(text: str) -> str:
    """The small Latin letter that a character is, or is a shape of; nothing where there is none."""
    bare = _bare(text)
    if bare in SHAPES:
        return SHAPES[bare]
    if len(bare) == 1 and bare.isascii() and bare.isalpha():
        return bare
    named = LATIN.search(unicodedata.name(bare, "")) if len(bare) == 1 else None
    return named[1].lower() if named else ""


@lru_cache(maxsize=1)
def _lookalikes() -> dict[str, list[str]]:
    """Character -> what looks like it, of Unicode's table of confusables."""
    try:
        table = import_module("confusable_homoglyphs.confusables").confusables_data
    except ImportError:
        raise InputError(
            "the prompt guard needs confusable-homoglyphs; install lidit-pipeline with its "
            "extra: [serve]"
        ) from None
    # Each character leads to its prototype and back to all others of it: the letter may be two
    # steps away.
    found: dict[str, list[str]] = {}
    for character, others in table.items():
        near = [other["c"] for other in others]
        far = [other["c"] for one in near for other in table.get(one, ())]
        found[character] = [*near, *far]
    return found
