"""A checker behind a deadline: whatever it does but answer as agreed is `SafetyUnavailable`, never a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")
ItemIn = TypeVar("ItemIn", contravariant=True)


class SafetyUnavailable(Exception):
    """A guard failed, so nothing may pass: the gateway answers 503 `safety_unavailable` and no picture.

    Its text names the guard and the kind of failure. It never holds what was checked, nor what the checker said.
    """

    def __init__(self, guard: str, reason: str) -> None:
        super().__init__(f"{guard}: {reason}")
        self.guard, self.reason = guard, reason


class Checker(Protocol[ItemIn]):
    """Scores things from 0, harmless, to 1. `version` changes with whatever could change a score.

    Prompts are checked as str (`WordList`), as states {encoder name: [T, W]} (`Probe`); images as uint8 arrays
    [height, width, 3] (`PixelRule`, `OnnxClassifier`).
    """

    @property
    def version(self) -> str: ...

    def scores(self, items: Sequence[ItemIn]) -> Sequence[float]: ...


@dataclass(frozen=True)
class Verdict:
    """What a guard found of one item. `guard` and `version` for the audit, `score` for `/v1/moderations`."""

    guard: str
    version: str
    score: float
    flagged: bool


class Guard(Generic[Item]):
    """A checker with a name, a threshold and a deadline.

    Args:
        threshold: in (0, 1]; an item with this score or more is flagged.
        deadline: seconds a call may take. A call that takes longer goes on in its thread and is left alone; while
            `MOST_HUNG` of them are stuck, the guard fails at once.
    """

    def __init__(self, name: str, checker: Checker[Item], threshold: float, deadline: float = 10.0) -> None:
        raise NotImplementedError

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict per item, in their order. Blocks up to the deadline: call it off the event loop.

        Raises SafetyUnavailable for anything but one finite score in [0, 1] per item within the deadline.
        """
        raise NotImplementedError
