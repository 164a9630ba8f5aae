"""The order: every sample once per epoch, one bucket per batch, random access, bounded memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lidit.data.order import Order, shares
from lidit.data.rng import Purpose, draw, permutation, uniform


def make_order(
    sizes: list[int], num_buckets: int, batch_size: int, window_units: int, seed: int = 3
) -> Order:
    generator = np.random.default_rng(0)
    units = [generator.integers(0, num_buckets, size) for size in sizes]
    counts = np.stack([np.bincount(unit, minlength=num_buckets) for unit in units])
    return Order(counts, lambda unit: units[unit], batch_size, seed, window_units)


def seen(order: Order, steps: range) -> list[tuple[int, int, int]]:
    batches = [order.batch(step) for step in steps]
    assert all(len(b.row) == order.batch_size for b in batches)
    return [(int(e), int(u), int(r)) for b in batches for e, u, r in zip(b.epoch, b.unit, b.row)]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=9),
    num_buckets=st.integers(1, 3),
    batch_size=st.integers(1, 13),
    window_units=st.integers(1, 5),
)
def test_every_sample_once_per_epoch(
    sizes: list[int], num_buckets: int, batch_size: int, window_units: int
) -> None:
    order = make_order(sizes, num_buckets, batch_size, window_units)
    epochs = 3
    samples = seen(order, range(order.batches_before(epochs)))
    assert len(samples) == len(set(samples)), "a sample came twice in an epoch"
    missing = epochs * sum(sizes) - len([s for s in samples if s[0] < epochs])
    assert 0 <= missing <= num_buckets * (batch_size - 1), (
        "more is missing than the buckets' leftovers"
    )
    later = seen(
        order, range(order.batches_before(epochs), order.batches_before(epochs + batch_size))
    )
    everything = {s for s in samples + later if s[0] < epochs}
    assert everything == {
        (e, u, r) for e in range(epochs) for u, size in enumerate(sizes) for r in range(size)
    }


def test_a_batch_by_unit_is_the_same_batch_and_its_shares_open_few_units() -> None:
    order = make_order([64] * 16, 1, 128, 16)
    drawn = opened = 0
    for step in range(order.batches_before(2)):
        batch = order.batch(step)
        by_unit = batch.by_unit()
        both = [
            sorted(zip(b.epoch.tolist(), b.unit.tolist(), b.row.tolist())) for b in (batch, by_unit)
        ]
        assert both[0] == both[1]
        for share in shares(128, 8):
            drawn += len(set(batch.slice(share.start, share.stop).unit.tolist()))
            opened += len(set(by_unit.slice(share.start, share.stop).unit.tolist()))
    assert opened < drawn / 3


def test_one_bucket_per_batch() -> None:
    order = make_order([31, 37, 41, 43], 4, 7, 2)
    for step in range(order.batches_before(2)):
        batch = order.batch(step)
        assert {int(order.buckets_of(int(u))[r]) for u, r in zip(batch.unit, batch.row)} == {
            batch.bucket
        }


def test_any_step_is_found_without_history() -> None:
    sizes = [31, 37, 41, 43, 5]
    forward = make_order(sizes, 3, 8, 2)
    steps = range(forward.batches_before(3))
    in_order = [forward.batch(step) for step in steps]
    for step in reversed(steps):
        fresh = make_order(sizes, 3, 8, 2).batch(step)
        for name in ("epoch", "unit", "row"):
            np.testing.assert_array_equal(getattr(fresh, name), getattr(in_order[step], name))


def test_epochs_and_seeds_differ() -> None:
    order, other = make_order([50, 50], 1, 10, 2), make_order([50, 50], 1, 10, 2, seed=4)
    first, second = seen(order, range(10)), seen(order, range(10, 20))
    assert [s[1:] for s in first] != [s[1:] for s in second]
    assert first != seen(other, range(10))


def test_golden_order() -> None:
    """The order is part of the format of a run: a change of these numbers breaks
    every resumed run.
    """
    batch = make_order([7, 5, 11], 2, 4, 2).batch(3)
    assert (
        batch.bucket,
        batch.epoch.tolist(),
        batch.unit.tolist(),
        batch.row.tolist(),
    ) == GOLDEN_BATCH
    assert draw(7, Purpose.NOISE, 1, 2, 3).item() == GOLDEN_DRAW


GOLDEN_BATCH = (0, [0, 0, 0, 0], [1, 2, 1, 0], [0, 8, 1, 5])
GOLDEN_DRAW = 2505957914559106406


def test_draws_are_uniform_and_apart() -> None:
    u = uniform(1, Purpose.TIMESTEP, 0, 5, np.arange(100_000))
    assert abs(u.mean() - 0.5) < 0.004
    assert np.histogram(u, 20, (0, 1))[0].min() > 4_700
    other = uniform(1, Purpose.DROPOUT, 0, 5, np.arange(100_000))
    assert abs(np.corrcoef(u, other)[0, 1]) < 0.02
    assert sorted(permutation(1000, 1, Purpose.UNITS, 0)) == list(range(1000))


@pytest.mark.parametrize("position", [0, 10**6, 10**9 // 2048 - 1, 10**9 // 2048 * 3 + 17])
def test_a_billion_samples_in_bounded_memory(position: int) -> None:
    units, per_unit, buckets = 250_000, 4_000, 5
    counts = np.full((units, buckets), per_unit // buckets, np.int32)
    rows = np.arange(per_unit) % buckets
    tracemalloc.start()
    order = Order(counts, lambda unit: rows, 2048, seed=0, window_units=16)
    batch = order.batch(position)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order.samples_per_epoch == 10**9
    assert len(set(zip(batch.epoch.tolist(), batch.unit.tolist(), batch.row.tolist()))) == 2048
    assert peak < 100e6
