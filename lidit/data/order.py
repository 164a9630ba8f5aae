"""The order of training: which samples make up global batch number `step`, for every step, without
any history.

An epoch permutes the units, cuts them into windows of `window_units`, and permutes the rows of each
window. The rows of one aspect bucket, in that order over all windows and epochs, form one endless
stream per bucket; consecutive chunks of the global batch size are its batches, so leftovers carry
over by themselves (also into the next epoch) and every sample is seen exactly once per epoch. A
window emits the batches whose last row lies in it, in permuted order.

Batch counts per window follow from the unit table alone (samples per unit and bucket), so batch
`step` is found by
prefix sums: the resume state is the step number, and nothing is replayed.

Letters: U units, K buckets, W windows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lidit.data.rng import Purpose, permutation

Ints = NDArray[np.int64]
WINDOWS_KEPT = 8


def shares(count: int, parts: int) -> list[slice]:
    """Consecutive slices of `count` things, as equal as they can be."""
    return [slice(part * count // parts, (part + 1) * count // parts) for part in range(parts)]


@dataclass(frozen=True)
class GlobalBatch:
    """One global batch: parallel arrays over its samples, all of one aspect bucket."""

    step: int
    bucket: int
    epoch: Ints
    unit: Ints
    row: Ints

    def slice(self, start: int, stop: int) -> GlobalBatch:
        return GlobalBatch(
            self.step,
            self.bucket,
            self.epoch[start:stop],
            self.unit[start:stop],
            self.row[start:stop],
        )

    def by_unit(self) -> GlobalBatch:
        """The same samples, those of one unit side by side: workers that share the batch out open
        few units each.
        """
        places = np.lexsort((self.row, self.unit, self.epoch))
        return GlobalBatch(
            self.step, self.bucket, self.epoch[places], self.unit[places], self.row[places]
        )


@dataclass(frozen=True)
class EpochSchedule:
    """Units and windows of one epoch, known before any row is read."""

    units: Ints  # [U] permuted unit numbers
    before: Ints  # [W + 1, K] rows of each bucket before each window, within the epoch


class Order:
    """`counts` [U, K]: samples of each bucket in each unit. `buckets_of(unit)` -> bucket of each
    row, -1 = left out.

    by_unit: whether the rows of a batch stand unit by unit, for workers that share it out.

    Memory: the counts, one permutation and W x K prefix sums; rows are looked at only for windows
    in use.
    """

    def __init__(
        self,
        counts: Ints,
        buckets_of: Callable[[int], Ints],
        batch_size: int,
        seed: int,
        window_units: int,
        by_unit: bool = False,
    ) -> None:
        self.counts, self.buckets_of = counts, buckets_of
        self.batch_size, self.seed, self.window_units, self.by_unit = (
            batch_size,
            seed,
            window_units,
            by_unit,
        )
        self.per_epoch = counts.sum(0, dtype=np.int64)  # [K]
        self.num_windows = -(-len(counts) // window_units)
        self._schedules: OrderedDict[int, EpochSchedule] = OrderedDict()
        self._rows: OrderedDict[tuple[int, int], list[tuple[Ints, Ints]]] = OrderedDict()

    @property
    def samples_per_epoch(self) -> int:
        return int(self.per_epoch.sum())

    def batches_before(self, epoch: int) -> int:
        """Global batches that are complete before `epoch` starts."""
        return int((self.per_epoch * epoch // self.batch_size).sum())

    def epoch_of(self, step: int) -> int:
        """The epoch in which batch `step` is completed."""
        low, high = 0, 1
        while self.batches_before(high) <= step:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.batches_before(middle) <= step else (low, middle)
        return low

    def batch(self, step: int) -> GlobalBatch:
        """Global batch number `step`, counted from 0 over all epochs."""
        epoch, window, done = self._completing(step)
        # [K] batches each bucket completes in this window
        emitted = done[window + 1] - done[window]
        # Within a window, batches of all buckets come in permuted order.
        shuffled = permutation(int(emitted.sum()), self.seed, Purpose.BATCHES, epoch, window)
        place = int(shuffled[step - done[window].sum()])
        bucket = int(np.searchsorted(np.cumsum(emitted), place, side="right"))
        number = int(done[window, bucket] + place - emitted[:bucket].sum())
        batch = self._chunk(step, bucket, number * self.batch_size)
        return batch.by_unit() if self.by_unit else batch

    def _completing(self, step: int) -> tuple[int, int, Ints]:
        """Epoch and window that complete batch `step`, and the epoch's [W + 1, K] batches before
        each window.
        """
        epoch = self.epoch_of(step)
        # Windows complete batches in order, so the window of a step is a search among running
        # totals.
        done = (self.per_epoch * epoch + self._schedule(epoch).before) // self.batch_size
        return epoch, int(np.searchsorted(done.sum(1), step, side="right")) - 1, done

    # -- windows, counted over all epochs: which units a step needs --------------------------------

    def window_of(self, step: int) -> int:
        """The window that completes batch `step`: the last one whose rows the batch reads."""
        epoch, window, _ = self._completing(step)
        return epoch * self.num_windows + window

    def window_units_of(self, window: int) -> Ints:
        """The units of a window."""
        epoch, within = divmod(window, self.num_windows)
        return self._schedule(epoch).units[
            within * self.window_units : (within + 1) * self.window_units
        ]

    def rows_before(self, window: int) -> Ints:
        """Rows [K] of each bucket's stream that lie before a window."""
        epoch, within = divmod(window, self.num_windows)
        return self.per_epoch * epoch + self._schedule(epoch).before[within]

    def window_at(self, bucket: int, position: int) -> int:
        """The window that holds one row of a bucket's stream."""
        epoch, within = divmod(position, int(self.per_epoch[bucket]))
        before = self._schedule(epoch).before[:, bucket]
        return epoch * self.num_windows + int(np.searchsorted(before, within, side="right")) - 1

    def _chunk(self, step: int, bucket: int, position: int) -> GlobalBatch:
        """The batch_size rows of one bucket's endless stream that start at `position`."""
        epochs, units, rows, wanted = [], [], [], self.batch_size
        while wanted:
            epoch, window = divmod(self.window_at(bucket, position), self.num_windows)
            unit, row = self._window(epoch, window)[bucket]
            start = position - int(self.rows_before(epoch * self.num_windows + window)[bucket])
            taken = min(wanted, len(unit) - start)
            epochs.append(np.full(taken, epoch))
            units.append(unit[start : start + taken])
            rows.append(row[start : start + taken])
            position, wanted = position + taken, wanted - taken
        return GlobalBatch(
            step, bucket, np.concatenate(epochs), np.concatenate(units), np.concatenate(rows)
        )

    def _schedule(self, epoch: int) -> EpochSchedule:
        if epoch not in self._schedules:
            units = permutation(len(self.counts), self.seed, Purpose.UNITS, epoch)
            starts = np.arange(0, len(units), self.window_units)
            # [W, K]
            per_window = np.add.reduceat(self.counts[units], starts, axis=0, dtype=np.int64)
            before = np.concatenate(
                [np.zeros((1, per_window.shape[1]), np.int64), per_window.cumsum(0)]
            )
            self._schedules[epoch] = EpochSchedule(units, before)
            while len(self._schedules) > 2:
                self._schedules.popitem(last=False)
        self._schedules.move_to_end(epoch)
        return self._schedules[epoch]

    def _window(self, epoch: int, window: int) -> list[tuple[Ints, Ints]]:
        """Per bucket the (unit, row) pairs of a window, permuted."""
        if (epoch, window) not in self._rows:
            members = self._schedule(epoch).units[
                window * self.window_units : (window + 1) * self.window_units
            ]
            buckets = [self.buckets_of(int(unit)) for unit in members]
            unit = np.repeat(members, [len(b) for b in buckets])
            row = np.concatenate([np.arange(len(b)) for b in buckets])
            shuffled = permutation(len(unit), self.seed, Purpose.ROWS, epoch, window)
            unit, row, bucket = unit[shuffled], row[shuffled], np.concatenate(buckets)[shuffled]
            self._rows[epoch, window] = [
                (unit[bucket == k], row[bucket == k]) for k in range(self.counts.shape[1])
            ]
            while len(self._rows) > WINDOWS_KEPT:
                self._rows.popitem(last=False)
        self._rows.move_to_end((epoch, window))
        return self._rows[epoch, window]
