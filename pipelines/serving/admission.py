"""Who may join the queue: a limit on everybody's compute units together, and a share of it for each
key.

One object counts for all gateways, so the limit does not multiply with them.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable

from pipelines.serving.errors import queue_full
from pipelines.serving.settings import LimitSettings

WINDOW_S = 120.0  # over which the rate is measured
LEAST_WAIT, MOST_WAIT = 1, 120  # seconds that clients are told to wait; OpenAI's do not wait longer


class Admission:
    """Counts the compute units of orders that wait or are drawn."""

    def __init__(self, limits: LimitSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._clock = limits, clock
        self.units = 0
        self._by_key: Counter[str] = Counter()
        self._done: deque[tuple[float, int]] = deque()
        self._busy_since = clock()

    def join(self, key: str, units: int) -> None:
        """Raises ApiError 429 where the queue, or the key's share of it, is full. An order alone
        always fits.
        """
        most, own = self.limits.queue_units, self.limits.queue_units * self.limits.key_share
        over = max(self.units + units - most, self._by_key[key] + units - own)
        if over > 0 and self._by_key[key]:
            raise queue_full(self._wait(over))
        if self.units and self.units + units > most:
            raise queue_full(self._wait(self.units + units - most))
        if not self.units:
            self._busy_since = self._clock()
        self.units += units
        self._by_key[key] += units

    def leave(self, key: str, units: int, drawn: bool) -> None:
        """An order that had joined has ended; `drawn`: by being finished, which is what the rate is
        measured by.
        """
        self.units -= units
        self._by_key[key] -= units
        if not self._by_key[key]:
            del self._by_key[key]
        if drawn:
            self._done.append((self._clock(), units))

    @property
    def rate(self) -> float | None:
        """Compute units per second lately, while there was work; None before
        anything was finished.
        """
        now = self._clock()
        while self._done and self._done[0][0] < now - WINDOW_S:
            self._done.popleft()
        if not self._done:
            return None
        return sum(units for _, units in self._done) / max(
            min(now - self._busy_since, WINDOW_S), 1e-3
        )

    def _wait(self, units: float) -> int:
        """Whole seconds until so many units are done at the present rate."""
        rate = self.rate
        wanted = MOST_WAIT if rate is None else math.ceil(units / rate)
        return min(max(wanted, LEAST_WAIT), MOST_WAIT)
