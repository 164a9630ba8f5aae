"""Control words: what a tokenizer turns into one token that steers a model, and a caption may only
spell.

Tokenizers flag some of them as special. Others are special by function alone: Gemma 3 lists
`<start_of_image>` among its added tokens without the flag, as it lists line breaks and HTML tags,
which are ordinary text. Only files that belong to an encoder's fingerprint are asked, so that one
fingerprint never stands for two readings of a caption.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

NUMBER_KEY = re.compile(r"token_(ids?|index)$")  # `boi_token_index`, but not `num_image_tokens`
TEXT_KEY = re.compile(r"tokens?$")  # `image_token`, `extra_special_tokens`
BRACKETED = tuple(map(re.compile, (r"<[^<>\s]+>", r"\[[^\[\]\s]+\]", r"\{[^{}\s]+\}")))
HTML_TAG = re.compile(r"</?([a-z][a-z0-9]*)/?>", re.IGNORECASE)
_ELEMENTS = (
    "a abbr address article aside audio b blockquote body br button canvas caption center cite "
    "code col colgroup dd del details dfn div dl dt em embed fieldset figcaption figure font "
    "footer form h1 h2 h3 h4 h5 h6 head header hr html i iframe img input ins kbd label legend "
    "li link main map mark meta nav ol option p picture pre q s samp script section select "
    "small source span strike strong style sub summary sup svg table tbody td textarea tfoot th "
    "thead title tr tt u ul var video wbr "
)
HTML_ELEMENTS = frozenset(_ELEMENTS.split())


class ControlWords:
    """Finds captions that spell a control word; without words, none does."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = {word for word in words if word.strip()}
        # A vocabulary has thousands of bracketed words: what stands in brackets is looked up among
        # them.
        others = sorted(word for word in self.words if not _is_bracketed(word))
        self.others = re.compile("|".join(map(re.escape, others))) if others else None

    def spelled_in(self, text: str) -> bool:
        bracketed = (match for shape in BRACKETED for match in shape.findall(text))
        return any(match in self.words for match in bracketed) or bool(
            self.others and self.others.search(text)
        )


def unflagged(added: dict[int, AddedToken], template: str, folder: Path) -> list[AddedToken]:
    """Added tokens that are special by function and not by flag: named by the chat template, by
    config.json or by tokenizer_config.json, or bracketed as control words are.
    """
    config, table = _read(folder / "config.json"), _read(folder / "tokenizer_config.json")
    table.pop("added_tokens_decoder", None)  # lists all of them, line breaks too
    numbers = {value for value in _named(config, NUMBER_KEY) if isinstance(value, int)}
    names = {
        value
        for tree in (config, table)
        for value in _named(tree, TEXT_KEY)
        if isinstance(value, str)
    }
    found = []
    for number, token in added.items():
        text = token.content
        if token.special or not text.strip() or text.isalnum():
            continue
        if number in numbers or text in names or text in template or _looks_like_control(text):
            found.append(token)
    return found


def flagged(token: AddedToken) -> AddedToken:
    """The same token, marked as special."""
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _looks_like_control(text: str) -> bool:
    tag = HTML_TAG.fullmatch(text)
    return _is_bracketed(text) and not (tag and tag[1].lower() in HTML_ELEMENTS)


def _is_bracketed(text: str) -> bool:
    return any(shape.fullmatch(text) for shape in BRACKETED)


def _named(value: Any, key: re.Pattern[str], named: bool = False) -> Iterator[Any]:
    """The values under keys that `key` finds, at any depth below them."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _named(child, key, named or bool(key.search(name)))
    elif isinstance(value, list):
        for child in value:
            yield from _named(child, key, named)
    elif named:
        yield value


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        # transformers has read what it needs, or refused the folder
        return {}
    return content if isinstance(content, dict) else {}
