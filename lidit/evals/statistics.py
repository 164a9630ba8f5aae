"""Intervals: bootstrap over clusters for one run, Student's t over seeds for several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lidit.errors import InputError

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(
    values: ArrayLike, clusters: Sequence[object] | None = None, seed: int = 0
) -> Interval:
    """The mean of `values` [N] with a percentile bootstrap interval.

    `clusters` [N] says which values belong together (images of one prompt): whole clusters are
    resampled, so correlated values do not narrow the interval. Raises InputError for no values or
    values that are not finite.
    """
    table = np.asarray(values, dtype=float).reshape(-1, 1)
    return bootstrap_columns(table, clusters, seed)[0]


def bootstrap_columns(
    table: ArrayLike, clusters: Sequence[object] | None = None, seed: int = 0
) -> list[Interval]:
    """`bootstrap_mean` of every column of `table` [N, K], rows resampled together; NaN marks a
    value that is absent.
    """
    values = np.asarray(table, dtype=float)
    if (
        values.ndim != 2
        or not len(values)
        or np.isinf(values).any()
        or np.isnan(values).all(axis=0).any()
    ):
        raise InputError(
            f"no interval for values of shape {list(values.shape)}: empty, infinite or an "
            "empty column"
        )
    _, cluster = np.unique(
        [str(c) for c in clusters] if clusters is not None else np.arange(len(values)),
        return_inverse=True,
    )
    if len(cluster) != len(values):
        raise InputError(
            f"{len(values)} values and {len(cluster)} clusters: one cluster is needed per value"
        )
    sums, counts = (np.zeros((cluster.max() + 1, values.shape[1])) for _ in range(2))
    np.add.at(sums, cluster, np.nan_to_num(values))
    np.add.at(counts, cluster, ~np.isnan(values))
    means = _resampled(sums, seed) / np.maximum(_resampled(counts, seed), 1e-12)
    centre = sums.sum(axis=0) / counts.sum(axis=0)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return [Interval(float(c), float(a), float(b)) for c, a, b in zip(centre, low, high)]


def bootstrap_overall(
    values: ArrayLike, groups: Sequence[object], clusters: Sequence[object]
) -> Interval:
    """The unweighted mean over `groups` [N] of their means of `values` [N], clusters resampled
    within each group.
    """
    flat, group = np.asarray(values, dtype=float), np.array([str(one) for one in groups])
    names = list(dict.fromkeys(group.tolist()))
    centre, resampled = 0.0, np.zeros(RESAMPLES)
    for seed, name in enumerate(names):
        chosen = group == name
        _, cluster = np.unique(
            [str(c) for c, kept in zip(clusters, chosen) if kept], return_inverse=True
        )
        table = np.zeros((cluster.max() + 1, 2))
        np.add.at(table, cluster, np.column_stack([flat[chosen], np.ones(chosen.sum())]))
        sums = _resampled(table, seed)
        resampled += sums[:, 0] / sums[:, 1] / len(names)
        centre += float(flat[chosen].mean()) / len(names)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(centre, float(low), float(high))


def _resampled(sums: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Sums [RESAMPLES, K] over clusters [C, K] drawn with replacement; the same draws for the same
    seed.
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    return weights @ sums


def mean_over_seeds(
    values: Sequence[float], least: float = -np.inf, most: float = np.inf
) -> Interval:
    """Mean over independent runs with Student's t interval. One run has no interval: low and high
    are then infinite.

    least, most: bounds of the mean and so of its interval (an accuracy is between 0 and 1).
    """
    if not len(values):
        raise InputError("no runs to average")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, -np.inf, np.inf)
    half = float(
        stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    )
    return Interval(mean, max(mean - half, least), min(mean + half, most))
