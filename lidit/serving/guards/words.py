"""The list of words: what is written in it is found in prompts, however it is spelled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from lidit.errors import InputError, one_line
from lidit.serving.guards.normalise import EDITION, fold, readings, spelled_out, squeezed, words

FOUND, SUSPECTED = 1.0, 0.5
# Letters of an entry that is looked for within a run: shorter ones stand anywhere by chance.
LEAST_SPELLED, LEAST_SQUEEZED = 3, 4


class WordList:
    """Checker of prompts. Score 1: an entry stands in the prompt as words; 0.5: only across the
    borders of words (a suspicion, for a second guard); else 0. Raises InputError for a missing,
    unreadable or empty list.

    The file: UTF-8, one word or phrase a line, # begins a comment. A plural is another word.
    """

    def __init__(self, path: Path) -> None:
        content = _content(path)
        self._entries: set[tuple[str, ...]] = set()
        for number, line in enumerate(content.splitlines(), 1):
            if entry := line.partition("#")[0].strip():
                parts = tuple(words(fold(entry)))
                if len("".join(parts)) < 2:
                    raise InputError(
                        f"{path}: line {number}: an entry needs two letters; it would be "
                        "found anywhere"
                    )
                self._entries.add(parts)
        if not self._entries:
            raise InputError(
                f"{path}: the list is empty, so nothing would be refused; write one entry a line"
            )
        self._longest = max(map(len, self._entries))
        self._joined = ["".join(entry) for entry in self._entries]
        digest = hashlib.sha256(f"{EDITION}\n{content}".encode()).hexdigest()
        self.version = f"words-{digest[:12]}"

    def scores(self, prompts: Sequence[str]) -> list[float]:
        """Of each prompt."""
        return [self._score(prompt) for prompt in prompts]

    def _score(self, prompt: str) -> float:
        if any(self._has_entry(reading) for reading in readings(prompt)):
            return FOUND
        if self._is_within(spelled_out(prompt), LEAST_SPELLED):
            return FOUND
        return SUSPECTED if self._is_within(squeezed(prompt), LEAST_SQUEEZED) else 0.0

    def _is_within(self, runs: Iterable[str], least: int) -> bool:
        entries = [entry for entry in self._joined if len(entry) >= least]
        return any(entry in run for run in runs for entry in entries)

    def _has_entry(self, reading: Sequence[str]) -> bool:
        return any(phrase in self._entries for phrase in _phrases(reading, self._longest))


def _phrases(reading: Sequence[str], longest: int) -> Iterable[tuple[str, ...]]:
    """Every run of at most `longest` words."""
    for start in range(len(reading)):
        for end in range(start + 1, min(start + longest, len(reading)) + 1):
            yield tuple(reading[start:end])


def _content(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: the word list cannot be read ({one_line(error, 200)}); give a UTF-8 file, "
            "one entry a line"
        ) from None
