"""The held-out split: about the recipe's fraction, from every unit, and known from the counts
alone.
"""

import numpy as np

from lidit.config import DataSettings
from lidit.data.held_out import held_out_counts, held_out_rows

# 500 units; a large bucket, a small bucket and an empty one
TOTALS = np.tile(np.array([[40, 3, 0]]), (500, 1))


def split(fraction: float, seed: int = 0) -> np.ndarray:
    return held_out_counts(TOTALS, DataSettings(validation_fraction=fraction, seed=seed))


def test_the_fraction_holds_also_where_a_unit_is_too_small_for_one_sample() -> None:
    counts = split(0.1)
    assert set(counts[:, 0]) == {4, 5} or set(counts[:, 0]) == {4}
    assert abs(counts[:, 1].mean() - 0.3) < 0.08  # of 3 samples a unit: 0 or 1
    assert (counts[:, 2] == 0).all()


def test_without_a_fraction_nothing_is_held_out() -> None:
    assert not split(0).any()


def test_the_rows_are_as_many_as_the_counts_say_in_every_bucket() -> None:
    bucket = np.repeat([0, 1], [40, 3])[np.random.default_rng(0).permutation(43)]
    for unit, counts in enumerate(split(0.1)[:50]):
        rows = held_out_rows(unit, bucket, counts, seed=0)
        assert np.bincount(bucket[rows], minlength=3).tolist() == counts.tolist()


def test_more_rows_held_out_include_the_fewer() -> None:
    bucket = np.zeros(40, np.int64)
    few, many = (held_out_rows(7, bucket, np.array([count]), seed=0) for count in (4, 9))
    assert ((many | few) == many).all()
    assert many.sum() == 9


def test_another_unit_or_seed_holds_out_other_rows() -> None:
    bucket, counts = np.zeros(40, np.int64), np.array([10])
    rows = held_out_rows(7, bucket, counts, seed=0)
    assert (rows != held_out_rows(8, bucket, counts, seed=0)).any()
    assert (rows != held_out_rows(7, bucket, counts, seed=1)).any()
