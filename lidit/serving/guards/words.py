"""The list of words: what is written in it is found in prompts, however it is spelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class WordList:
    """Checker of prompts. Score 1: an entry stands in the prompt as words; 0.5: only across the borders of words
    (a suspicion, for a second guard); else 0. Raises InputError for a missing, unreadable or empty list.

    The file: UTF-8, one word or phrase a line, # begins a comment.
    """

    def __init__(self, path: Path) -> None:
        raise NotImplementedError

    @property
    def version(self) -> str:
        """sha256 of the list and of the normaliser's version, shortened."""
        raise NotImplementedError

    def scores(self, prompts: Sequence[str]) -> list[float]:
        raise NotImplementedError
