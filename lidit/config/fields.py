"""What a value must be wherever it comes from: a place on disk, a prompt, a seed. Settings and
commands share these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from lidit.errors import InputError

LARGEST_SEED = 2**64 - 1  # what random generators take
LONGEST_PROMPT = 100_000  # characters, as of captions
HOME = re.compile(r"(file://|sqlite:///)?(~[^/]*)")


def expand_home(place: str) -> str:
    """`~` and `~name` at the beginning of a path become that home folder; every other text stays as
    it is.
    """
    match = HOME.match(place)
    if match is None:
        return place
    scheme, home = match.groups()
    try:
        folder = str(Path(home).expanduser())
    except RuntimeError:
        raise ValueError(
            f"{home!r} is nobody's home folder; write ./{home} for a folder of that name"
        ) from None
    return f"{(scheme or '')}{folder}{place[match.end() :]}"


def text_problem(text: str, what: str) -> str | None:
    """Why no tokenizer and no file takes a text; None for one that is good. what: "caption",
    "prompt".
    """
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return f"invalid UTF-8: the {what} holds bytes that are no text"
    if "\0" in text:
        return f"invalid {what}: holds a NUL byte"
    return None


def prompt_problem(prompt: str) -> str | None:
    """Why a prompt cannot be drawn; None for a good one, which the empty one is."""
    if len(prompt) > LONGEST_PROMPT:
        return f"prompt too long: {len(prompt):,} characters, {LONGEST_PROMPT:,} are read"
    return text_problem(prompt, "prompt")


def check_prompts(prompts: Iterable[str], origin: str) -> None:
    """Raises InputError that names the first prompt which cannot be drawn, by its number from 1."""
    for number, prompt in enumerate(prompts, start=1):
        if problem := prompt_problem(prompt):
            raise InputError(
                f"{origin}: prompt {number}: {problem}; write it in UTF-8, and shorter"
            )


def check_seeds(seeds: Iterable[int], origin: str) -> None:
    """Raises InputError for a seed of more than 64 bits."""
    if wrong := [seed for seed in seeds if not 0 <= seed <= LARGEST_SEED]:
        raise InputError(f"{origin}: seed {wrong[0]}: must be from 0 to {LARGEST_SEED} (64 bits)")


def _drawable(prompt: str) -> str:
    if problem := prompt_problem(prompt):
        raise ValueError(problem)
    return prompt


Place = Annotated[str, AfterValidator(expand_home)]
Prompt = Annotated[str, AfterValidator(_drawable)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Fraction = Annotated[float, Field(ge=0, le=1)]
