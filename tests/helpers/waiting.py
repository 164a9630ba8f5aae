"""Waiting for what another process does: files, sockets and stores give no event to wait on, so
they are asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def wait_until(
    condition: Callable[[], Found],
    seconds: float,
    problem: Callable[[], str | None] = lambda: None,
    every: float = 0.02,
) -> Found:
    """The condition's first true value. Fails after `seconds`, or at once with what
    `problem` says.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        reason = problem()
        assert reason is None, reason
        assert time.monotonic() < deadline, f"nothing happened within {seconds:.0f} seconds"
        time.sleep(every)  # between two looks, so that the one who is waited for has the processor
    return found
