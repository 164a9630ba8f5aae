"""A word of the list is found in any spelling that a reader or a model would see through."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from lidit.errors import InputError
from lidit.serving.guards.normalise import fold
from lidit.serving.guards.words import FOUND, SUSPECTED, WordList

PLAIN = "forbidden"
FULL_WIDTH = "".join(chr(ord(letter) + 0xFEE0) for letter in PLAIN)
BOLD = "".join(chr(0x1D41A + ord(letter) - ord("a")) for letter in PLAIN)
CIRCLED = "".join(chr(0x24D0 + ord(letter) - ord("a")) for letter in PLAIN)
SQUARED = "".join(chr(0x1F170 + ord(letter) - ord("a")) for letter in PLAIN)
FLAGS = "".join(chr(0x1F1E6 + ord(letter) - ord("a")) for letter in PLAIN)
SEEN_THROUGH = {
    "plain": PLAIN,
    "capitals": PLAIN.upper(),
    "mixed case": "fOrBiDdEn",
    "full width": FULL_WIDTH,
    "bold letters": BOLD,
    "circled letters": CIRCLED,
    "squared letters": SQUARED,
    "flags": FLAGS,
    "zero width": "\u200b".join(PLAIN),
    "soft hyphens": "for\u00adbid\u00adden",
    "marks over letters": "\u0336".join(PLAIN),
    "accents": "fórbïddèn",
    "cyrillic": "fоrbіddеn",
    "greek": "fοrbιddεn",
    "small capitals": "ꜰᴏʀʙɪᴅᴅᴇɴ",
    "hooks and strokes": "ƒørƀıđɗɇɲ",
    "digits": "f0rb1dd3n",
    "signs": "f0rb!dd€n",
    "spaces": "f o r b i d d e n",
    "digits and spaces": "f 0 r b 1 d d 3 n",
    "dots": "f.o.r.b.i.d.d.e.n",
    "hyphen": "for-bidden",
    "underscores": "f_o_r_b_i_d_d_e_n",
    "stretched": "foooorbiddennnn",
    "right to left": "\u202eneddibrof\u202c",
}
NOT_SEEN_THROUGH = {"translated": "verboten", "base64": base64.b64encode(PLAIN.encode()).decode()}


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> WordList:
    return word_list(
        tmp_path_factory.mktemp("list"),
        "# planted\nforbidden\nlarge red ball  # a phrase\nklein\nass\n",
    )


def word_list(folder: Path, content: str) -> WordList:
    (folder / "list.txt").write_text(content, encoding="utf-8")
    return WordList(folder / "list.txt")


@pytest.mark.parametrize("spelling", SEEN_THROUGH.values(), ids=SEEN_THROUGH)
def test_a_spelling_is_seen_through(guard: WordList, spelling: str) -> None:
    assert guard.scores([f"a picture of a {spelling} thing"]) == [FOUND]


@pytest.mark.parametrize("spelling", NOT_SEEN_THROUGH.values(), ids=NOT_SEEN_THROUGH)
def test_what_a_list_cannot_see_is_known(guard: WordList, spelling: str) -> None:
    assert guard.scores([f"a picture of a {spelling} thing"]) == [0]


def test_a_phrase_is_found_as_words_in_their_order(guard: WordList) -> None:
    prompts = ["a LARGE,  red bаll", "a red large ball", "a large red", "enlarge red ball"]
    assert guard.scores(prompts) == [FOUND, 0, 0, SUSPECTED]


@pytest.mark.parametrize(
    "harmless",
    [
        "a glass of kvass in the grass",
        "a class passes 455 bass players",
        "an unforbiddenly long word",
        "as as",
    ],
)
def test_a_word_within_a_word_is_no_word(guard: WordList, harmless: str) -> None:
    assert guard.scores([harmless])[0] < FOUND


def test_across_the_borders_of_words_is_a_suspicion(guard: WordList) -> None:
    assert guard.scores(["put it for bidden ducks"]) == [SUSPECTED]


def test_prompts_are_scored_each_for_itself(guard: WordList) -> None:
    assert guard.scores(["a cat", "forbidden", "a dog"]) == [0, FOUND, 0]
    assert guard.scores([]) == []


def test_a_list_in_another_script_finds_its_words(tmp_path: Path) -> None:
    guard = word_list(tmp_path, "запрещено\n禁止\n")
    assert guard.scores(["это Запрещено здесь", "禁止", "разрешено"]) == [FOUND, FOUND, 0]


@pytest.mark.parametrize("content", ["", "\n  \n", "# only a comment\n", "x\n", "forbidden\n---\n"])
def test_a_list_that_refuses_nothing_or_everything_is_no_list(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"list\.txt"):
        word_list(tmp_path, content)


def test_a_list_that_cannot_be_read_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        WordList(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read"):
        WordList(tmp_path / "latin.txt")


def test_the_version_is_of_the_lists_content(tmp_path: Path) -> None:
    first, second = word_list(tmp_path, "one\n"), word_list(tmp_path, "one\ntwo\n")
    assert first.version != second.version == word_list(tmp_path, "one\ntwo\n").version


def test_folding_leaves_what_is_not_latin() -> None:
    assert fold("Größe Ångström") == "grosse angstrom"
    assert fold("漢字 日本") == "漢字 日本"
