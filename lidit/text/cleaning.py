"""What public systems do to a caption's text before it is tokenised."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence

PAIRS = (("'", "'"), ('"', '"'), ("‘", "’"), ("“", "”"))
APOSTROPHE = re.compile(r"[a-zA-Z]+'[a-zA-Z]+")
QUOTED = [re.compile(f"{opening}(.*?){closing}") for opening, closing in PAIRS]
SPELLED = re.compile("|".join(f"{a}[^{a}{b}]*?{b}" for a, b in PAIRS))


def _glyphs(texts: Sequence[str]) -> str | None:
    """HunyuanImage's words for the texts that an image shows; None without any."""
    return "".join(f'Text "{text}". ' for text in texts) or None


def _quoted(text: str) -> str | None:
    return _glyphs([found for pattern in QUOTED for found in pattern.findall(text)])


RULES: dict[str, Callable[[str], str | None]] = {
    "strip": str.strip,
    "lower": str.lower,
    "whitespace": lambda text: re.sub(r"\s+", " ", text),
    "unescape": lambda text: html.unescape(html.unescape(text)),
    "no_image_mark": lambda text: text.replace("[IMG]", ""),
    "space_if_empty": lambda text: text or " ",
    "glyphs": _quoted,
}


def clean(caption: str, rules: Sequence[str]) -> str | None:
    """The text that is tokenised; None where nothing is, as a glyph encoder has it of captions
    without quoted text.
    """
    text: str | None = caption
    for rule in rules:
        if text is None:
            break
        text = RULES[rule](text)
    return text


def split_quoted(text: str) -> list[str]:
    """Pieces that are tokenised one by one: quoted text falls into characters, its quotation marks
    included.

    An apostrophe within a word opens no quotation.
    """
    hidden = APOSTROPHE.sub(lambda match: match[0].replace("'", "\0"), text)
    pieces: list[str] = []
    end = 0
    for match in SPELLED.finditer(hidden):
        pieces += [hidden[end : match.start()], *match[0]]
        end = match.end()
    pieces.append(hidden[end:])
    return [piece.replace("\0", "'") for piece in pieces if piece]
