"""Which units a training needs next, by its own order: a pure function of unit table, settings and
step.

A rolling family is computed and deleted by it. A batch that is completed in window w reads rows of
w and, where the
windows before left rows over, of those: a rare bucket's batch may reach many windows back. The
units of these leftovers are `carried`; nothing that a step still needs is ever outside `needed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lidit.data.order import Order
from lidit.data.rng import Purpose, permutation


class Demand:
    """The needs of one training run of `steps` steps.

    pinned: units that it needs all along, those of its validation batches.
    """

    def __init__(self, order: Order, steps: int, pinned: frozenset[int] = frozenset()) -> None:
        self.order, self.steps, self.pinned = order, steps, pinned
        self.last = order.window_of(max(0, steps - 1))

    def window(self, step: int) -> int:
        """The window in use at `step`, the last one after the last step."""
        return self.last if step >= self.steps else self.order.window_of(step)

    def carried(self, window: int) -> list[int]:
        """Units of earlier windows that batches completed in `window` or later still read, by the
        unit table alone.
        """
        order, found = self.order, []
        for bucket, position in enumerate(order.rows_before(window).tolist()):
            number, left = divmod(position, order.batch_size)
            if not left:
                continue
            # A batch that is completed after the last step is read by nobody.
            if order.window_at(bucket, (number + 1) * order.batch_size - 1) > self.last:
                continue
            first = order.window_at(bucket, number * order.batch_size)
            # In a whole epoch every unit comes once, and twice as many windows always hold one.
            for earlier in range(max(first, window - 2 * order.num_windows), window):
                units = order.window_units_of(earlier)
                found.append(units[order.counts[units, bucket] > 0])
        return unique(np.concatenate(found).tolist()) if found else []

    def needed(self, step: int, ahead: int) -> list[list[int]]:
        """Units that `step` and later ones need, by distance: at 0 those of the window in use, then
        window by window.

        Of at most `ahead` windows more, none of them after the last step's. A unit stands at its
        first use.
        """
        if step >= self.steps:
            return []
        window = self.window(step)
        listed = [[*self.carried(window), *self.order.window_units_of(window).tolist()]]
        for later in range(window + 1, min(window + ahead, self.last) + 1):
            listed.append(self.order.window_units_of(later).tolist())
        return first_uses(listed)

    def replayed(self, checkpoint: int, step: int) -> list[int]:
        """Units that only the steps from `checkpoint` up to the window of `step` need, in the order
        of their use.

        They are used again if the run goes on from its checkpoint.
        """
        if checkpoint >= self.steps:
            return []
        begin, end = self.window(checkpoint), self.window(step) + (step >= self.steps)
        listed = [
            self.carried(begin),
            *(self.order.window_units_of(w).tolist() for w in range(begin, end)),
        ]
        return unique(unit for units in listed for unit in units)


def validation_units(order: Order, batches: int) -> frozenset[int]:
    """The units behind the first `batches` batches of the held-out part: whole windows, no row is
    looked at.
    """
    if not batches:
        return frozenset()
    windows = range(order.window_of(batches - 1) + 1)
    return frozenset(unit for window in windows for unit in order.window_units_of(window).tolist())


def kept_units(fingerprint: str, units: int, share: float) -> frozenset[int]:
    """The fixed share of a family's units that is never deleted: the same in every epoch and for
    every reader.

    A cache that keeps what was used last has forgotten every unit before it comes again; a fixed
    share is met in full.
    """
    order = permutation(units, int(fingerprint[:15], 16), Purpose.KEEP)
    return frozenset(order[: round(share * units)].tolist())


def unique(units: Iterable[int]) -> list[int]:
    """Each unit once, at its first place."""
    return list(dict.fromkeys(units))


def first_uses(listed: Sequence[Sequence[int]]) -> list[list[int]]:
    """The lists, each unit in the first one that has it."""
    known: set[int] = set()
    found = []
    for units in listed:
        fresh = [unit for unit in unique(units) if unit not in known]
        known.update(fresh)
        found.append(fresh)
    return found
