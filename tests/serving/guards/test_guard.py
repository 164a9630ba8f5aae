"""Every failure of a checker closes: each broken one here is a way in which checkers fail in
earnest.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from lidit.serving.guards.guard import MOST_STUCK, Guard, SafetyUnavailable, Verdict
from tests.helpers.waiting import wait_until

SECRET = "the words of a prompt"
never = threading.Event()


class Checks:
    """A checker that answers what a function makes of its items."""

    version = "checks-1"

    def __init__(self, answer: Callable[[Sequence[Any]], Any]) -> None:
        self.scores = answer


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """Calls that hang end with their test."""
    never.clear()
    yield
    never.set()


def raises(items: Sequence[str]) -> list[float]:
    raise ValueError(f"cannot read {items[0]}")


BROKEN: dict[str, Callable[[Sequence[str]], Any]] = {
    "raises": raises,
    "exits": lambda items: sys.exit(0),
    "times out by itself": lambda items: (_ for _ in ()).throw(TimeoutError(SECRET)),
    "hangs": lambda items: never.wait(60) and [0.0],
    "answers not a number": lambda items: [float("nan")] * len(items),
    "answers too few": lambda items: [0.0] * (len(items) - 1),
    "answers too many": lambda items: [0.0] * (len(items) + 1),
    "answers nothing": lambda items: None,
    "answers one number for all": lambda items: 0.0,
    "answers in words": lambda items: ["safe"] * len(items),
    "answers a text": lambda items: "0" * len(items),
    "answers true": lambda items: [False] * len(items),
    "answers nothing for each": lambda items: [None] * len(items),
    "answers more than one": lambda items: [1.5] * len(items),
    "answers less than nothing": lambda items: [-0.1] * len(items),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_checker_closes(broken: Callable[[Sequence[str]], Any]) -> None:
    guard = Guard[str]("broken", Checks(broken), 0.5, deadline=0.2)
    with pytest.raises(SafetyUnavailable) as failure:
        guard.judge([SECRET, SECRET])
    # What is logged of the failure tells who failed and how, not what was asked.
    assert str(failure.value).startswith("broken: ")
    assert SECRET not in str(failure.value)
    assert failure.value.__cause__ is None
    assert failure.value.__context__ is None


def test_a_checker_without_a_version_closes() -> None:
    checker = Checks(lambda items: [0.0] * len(items))
    checker.version = ""
    with pytest.raises(SafetyUnavailable, match="version"):
        Guard[str]("nameless", checker, 0.5).judge(["a"])


def test_an_item_is_flagged_from_the_threshold_on() -> None:
    guard = Guard[float]("same", Checks(list), 0.5)
    assert [verdict.flagged for verdict in guard.judge([0, 0.49, 0.5, 1, np.float32(0.75)])] == [
        0,
        0,
        1,
        1,
        1,
    ]
    assert guard.judge([0.25]) == [Verdict("same", "checks-1", 0.25, False)]
    assert guard.judge([]) == []


def test_a_call_that_hangs_holds_up_no_other() -> None:
    guard = Guard[str](
        "slow", Checks(lambda items: [float(items[0] == "hang" and never.wait(60))]), 0.5, 0.2
    )
    with pytest.raises(SafetyUnavailable, match="in time"):
        guard.judge(["hang"])
    guard.deadline = 60
    assert not guard.judge(["go"])[0].flagged


def test_a_checker_that_always_hangs_is_given_up_until_a_call_returns() -> None:
    guard = Guard[str]("stuck", Checks(lambda items: [float(never.wait(60) and 0)]), 0.5, 0.05)
    for _ in range(MOST_STUCK):
        with pytest.raises(SafetyUnavailable, match="in time"):
            guard.judge(["a"])
    before = threading.active_count()
    with pytest.raises(SafetyUnavailable, match="stuck"):
        guard.judge(["a"])
    assert threading.active_count() <= before
    never.set()
    guard.deadline = 60
    wait_until(lambda: not guard.stuck, 60)
    assert not guard.judge(["a"])[0].flagged


@pytest.mark.parametrize(
    ("threshold", "deadline"), [(0, 1), (1.1, 1), (float("nan"), 1), (0.5, 0), (0.5, float("nan"))]
)
def test_a_guard_that_could_flag_nothing_or_everything_is_refused(
    threshold: float, deadline: float
) -> None:
    with pytest.raises(ValueError, match="guard g"):
        Guard[str]("g", Checks(list), threshold, deadline)
