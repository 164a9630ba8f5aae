"""The held-out split: which samples training never sees, by their unit, bucket and row alone.

Held out are, per unit and bucket, the rows with the smallest random numbers. How many these are
follows from the counts of the unit table, so that the order of a billion samples needs no row.

Letters: U units, K buckets, R rows of one unit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lidit.config import DataSettings
from lidit.data.order import Ints
from lidit.data.rng import Purpose, draw, uniform


def held_out_counts(totals: Ints, settings: DataSettings) -> Ints:
    """Held-out samples of each bucket in each unit [U, K], of `totals` [U, K]; all 0 without a
    validation part.
    """
    if settings.validation_fraction == 0:
        return np.zeros_like(totals)
    # Stochastic rounding: a unit too small for a whole held-out sample still gives one now and
    # then.
    units, buckets = np.arange(len(totals))[:, None], np.arange(totals.shape[1])
    spread = uniform(settings.seed, Purpose.HOLDOUT, units, buckets)
    return np.floor(totals * settings.validation_fraction + spread * (totals > 0)).astype(np.int64)


def held_out_rows(unit: int, bucket: Ints, counts: Ints, seed: int) -> NDArray[np.bool_]:
    """True for the held-out rows of a unit, of the rows' `bucket` [R]; `counts` [K] is the unit's
    held_out_counts.
    """
    held_out = np.zeros(len(bucket), bool)
    drawn = draw(seed, Purpose.HOLDOUT, unit, np.arange(len(bucket)))
    for number, count in enumerate(counts):
        members = np.flatnonzero(bucket == number)
        held_out[members[np.argsort(drawn[members], kind="stable")[:count]]] = True
    return held_out
