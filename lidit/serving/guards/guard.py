"""A checker behind a deadline: whatever it does but answer as agreed is `SafetyUnavailable`, never
a pass.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Generic, Protocol, TypeVar

Item = TypeVar("Item")
ItemIn = TypeVar("ItemIn", contravariant=True)
MOST_STUCK = 4


class SafetyUnavailable(Exception):
    """A guard failed, so nothing may pass: the gateway answers 503 `safety_unavailable` and no
    picture.

    Its text names the guard and the kind of failure. It never holds what was checked, nor what the
    checker said.
    """

    def __init__(self, guard: str, reason: str) -> None:
        super().__init__(f"{guard}: {reason}")
        self.guard, self.reason = guard, reason


class Checker(Protocol[ItemIn]):
    """Scores things from 0, harmless, to 1. `version` changes with whatever could change a score.

    Prompts are checked as str (`WordList`), as states {encoder name: [T, W]} (`Probe`); images as
    uint8 arrays [height, width, 3] (`PixelRule`, `OnnxClassifier`).
    """

    @property
    def version(self) -> str: ...

    def scores(self, items: Sequence[ItemIn]) -> Sequence[float]: ...


@dataclass(frozen=True)
class Verdict:
    """What a guard found of one item. `guard` and `version` for the audit, `score` for
    `/v1/moderations`.
    """

    guard: str
    version: str
    score: float
    flagged: bool


class Guard(Generic[Item]):
    """A checker with a name, a threshold and a deadline.

    Args:
        threshold: in (0, 1]; an item with this score or more is flagged.
        deadline: seconds a call may take. A call that takes longer goes on in its thread and is
            left alone; while
            `MOST_STUCK` of them are stuck, the guard fails at once.
    """

    def __init__(
        self, name: str, checker: Checker[Item], threshold: float, deadline: float = 10.0
    ) -> None:
        if not 0 < threshold <= 1 or not deadline > 0:  # not `<= 0`: NaN is refused too
            raise ValueError(f"guard {name}: a threshold is in (0, 1], a deadline above 0 seconds")
        self.name, self.checker, self.threshold, self.deadline = name, checker, threshold, deadline
        self._lock = threading.Lock()
        self._late: list[_Call] = []

    @property
    def stuck(self) -> int:
        """Calls that are past their deadline and still under way."""
        with self._lock:
            return sum(not call.done.is_set() for call in self._late)

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict per item, in their order. Blocks up to the deadline: call it off the event
        loop.

        Raises SafetyUnavailable for anything but one finite score in [0, 1] per item within the
        deadline.
        """
        version, scores = self._answer(list(items))
        if not isinstance(version, str) or not version:
            raise SafetyUnavailable(self.name, "it has no version")
        if not isinstance(scores, Sequence) or isinstance(scores, str | bytes):
            raise SafetyUnavailable(self.name, "its answer cannot be read")
        if len(scores) != len(items):
            raise SafetyUnavailable(self.name, "its answer has another number of scores")
        return [self._verdict(version, score) for score in scores]

    def _verdict(self, version: str, score: Any) -> Verdict:
        # True is a number to Python, and a text such as "0.1" to float(); neither is a score.
        if isinstance(score, bool) or not isinstance(score, Real):
            raise SafetyUnavailable(self.name, "its answer cannot be read")
        value = float(score)
        if not math.isfinite(value) or not 0 <= value <= 1:
            raise SafetyUnavailable(self.name, "a score is not between 0 and 1")
        return Verdict(self.name, version, value, value >= self.threshold)

    def _answer(self, items: list[Item]) -> tuple[Any, Any]:
        """The checker's version and scores, from a thread of its own: a call that hangs holds up
        only itself.
        """
        if self.stuck >= MOST_STUCK:
            raise SafetyUnavailable(self.name, f"{MOST_STUCK} calls are stuck")
        call = _Call(self.checker, items)
        threading.Thread(target=call.run, name=f"guard-{self.name}", daemon=True).start()
        if not call.done.wait(self.deadline):
            with self._lock:
                self._late = [late for late in [*self._late, call] if not late.done.is_set()]
            raise SafetyUnavailable(self.name, "it did not answer in time")
        if call.raised:
            raise SafetyUnavailable(self.name, f"it raised {call.raised}")
        return call.answer


class _Call:
    """One call of a checker. Of an error only its type is kept: its text may quote what was
    checked.
    """

    def __init__(self, checker: Checker[Any], items: list[Any]) -> None:
        self.checker, self.items = checker, items
        self.done = threading.Event()
        self.answer: tuple[Any, Any] = (None, None)
        self.raised = ""

    def run(self) -> None:
        try:
            self.answer = self.checker.version, self.checker.scores(self.items)
        except BaseException as error:  # SystemExit too: it would end the thread without an answer
            self.raised = type(error).__name__
        finally:
            self.done.set()
