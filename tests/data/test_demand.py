"""Which units a step needs, against the rows that its batches read; and what a producer makes of
it, without files.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lidit.data.credit import Credit
from lidit.data.demand import Demand, kept_units
from lidit.data.order import Order
from lidit.data.production import Needs, Reader, needs, plan_step, together, windows_ready


def make_order(
    sizes: list[int], num_buckets: int, batch_size: int, window_units: int, seed: int = 3
) -> Order:
    generator = np.random.default_rng(seed)
    units = [
        np.where(generator.random(size) < 0.8, 0, generator.integers(0, num_buckets, size))
        for size in sizes
    ]
    counts = np.stack([np.bincount(unit, minlength=num_buckets) for unit in units])
    return Order(counts, lambda unit: units[unit], batch_size, seed, window_units)


@settings(max_examples=30, deadline=None)
# a batch of more than an epoch
@example(sizes=[9, 12, 1, 2], num_buckets=3, batch_size=5, window_units=1, ahead=0)
@given(
    sizes=st.lists(st.integers(1, 23), min_size=2, max_size=12),
    num_buckets=st.integers(1, 4),
    batch_size=st.integers(1, 13),
    window_units=st.integers(1, 4),
    ahead=st.integers(0, 3),
)
def test_no_step_reads_a_unit_outside_its_needs(
    sizes: list[int], num_buckets: int, batch_size: int, window_units: int, ahead: int
) -> None:
    order = make_order(sizes, num_buckets, batch_size, window_units)
    steps = order.batches_before(3)
    if not steps:
        return
    demand = Demand(order, steps)
    read = [set(order.batch(step).unit.tolist()) for step in range(steps)]
    windows = [order.window_of(step) for step in range(steps)]
    assert windows == sorted(windows)
    for step in range(0, steps, 3):
        listed = demand.needed(step, ahead)
        for later in range(step, steps):
            if windows[later] > windows[step] + ahead:
                break
            # Whatever a later step reads was listed for its window or before.
            known = {
                unit for units in listed[: windows[later] - windows[step] + 1] for unit in units
            }
            assert read[later] <= known
        flat = [unit for units in listed for unit in units]
        assert len(flat) == len(set(flat))
        first = step - min(step, 5)
        replayed, now = set(demand.replayed(first, step)), set(listed[0])
        for between in range(first, step):
            assert read[between] <= replayed | now


def test_with_one_bucket_only_the_window_before_is_carried() -> None:
    order = make_order([20] * 30, 1, 16, 3)
    demand = Demand(order, order.batches_before(2))
    for window in range(1, 15):
        assert set(demand.carried(window)) <= set(order.window_units_of(window - 1).tolist())


def test_a_batch_that_no_step_takes_holds_nothing() -> None:
    """A rare bucket's first batch would be complete long after the run's end: its rows are not
    waited for.
    """
    counts = np.tile([[20, 1]], (30, 1))
    rows = np.array([0] * 20 + [1])
    order = Order(counts, lambda unit: rows, 64, 3, 3)
    short = Demand(order, 6)
    assert set(short.carried(2)) <= set(order.window_units_of(1).tolist())
    long = Demand(order, order.batches_before(4))
    # In the run that reaches it, everything since its first row is held.
    assert len(long.carried(5)) == 15


def test_the_kept_share_is_exact_and_grows_with_the_share() -> None:
    for share in (0.0, 0.1, 0.3, 1.0):
        assert len(kept_units("ab" * 32, 1000, share)) == round(share * 1000)
    assert kept_units("ab" * 32, 1000, 0.1) < kept_units("ab" * 32, 1000, 0.3)
    assert kept_units("ab" * 32, 1000, 0.3) != kept_units("cd" * 32, 1000, 0.3)


# -- the rules of production -----------------------------------------------------------------------


def credit_of(
    order: Order, steps: int, step: int = 0, checkpoint: int = 0, run: str = "run", seed: int = 3
) -> Credit:
    return Credit(run, seed, order.window_units, order.batch_size, 0.0, 0, steps, step, checkpoint)


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_units_pass_through_a_budget_of_eight(seed: int) -> None:
    """At random moments: encoders finish, the reader moves, saves, and falls back to its
    checkpoint.
    """
    chance = random.Random(seed)
    order = make_order([16] * 1000, 1, 24, 2, seed)
    steps = order.batches_before(1)
    demand, step, checkpoint, computed = Demand(order, steps), 0, 0, 0
    present, in_flight = set[int](), set[int]()
    reads: dict[int, set[int]] = {}
    looks = 0
    while step < steps:
        looks += 1
        assert looks < 100_000, "the production stands still"
        wants = needs([Reader(credit_of(order, steps, step, checkpoint), demand)], 2)
        plan = plan_step(wants, present, in_flight, chance.randrange(5), frozenset(), 8)
        assert not plan.stuck
        assert not set(plan.remove) & set(wants.wanted[0]), (
            "a unit of the window in use was deleted"
        )
        present -= set(plan.remove)
        in_flight |= set(plan.start)
        assert len(present | in_flight) <= 8
        assert not present & in_flight
        for unit in chance.sample(sorted(in_flight), chance.randrange(len(in_flight) + 1)):
            in_flight.discard(unit)
            present.add(unit)
            computed += 1
        for _ in range(chance.randrange(30)):
            if step not in reads:
                reads[step] = set(order.batch(step).unit.tolist())
            if step < steps and reads[step] <= present:
                step += 1
                if step == steps:
                    break
            else:
                break
        if chance.random() < 0.2:
            checkpoint = step
        if chance.random() < 0.02 and step < steps:
            step = checkpoint
    assert computed >= 1000


def test_a_budget_that_the_window_in_use_exceeds_is_named() -> None:
    order = make_order([16] * 40, 1, 24, 4)
    reader = Reader(
        credit_of(order, order.batches_before(1)), Demand(order, order.batches_before(1))
    )
    wants = needs([reader], 2)
    present = set(wants.wanted[0][:3])
    plan = plan_step(wants, present, set(), 2, frozenset(), 3)
    assert "online.budget: 3 units are too few, the window in use needs 4 at once" in plan.stuck
    assert plan_step(wants, present, {wants.wanted[0][3]}, 2, frozenset(), 3).stuck == ""


def test_behind_the_checkpoint_everything_goes_and_before_it_what_room_allows() -> None:
    order = make_order([16] * 40, 1, 16, 2)
    steps = order.batches_before(1)
    demand = Demand(order, steps)
    step = next(s for s in range(steps) if order.window_of(s) == 8)
    checkpoint = next(s for s in range(steps) if order.window_of(s) == 5)
    present = {unit for window in range(9) for unit in order.window_units_of(window).tolist()}
    wants = needs([Reader(credit_of(order, steps, step, checkpoint), demand)], 1)
    passed = {unit for window in range(5) for unit in order.window_units_of(window).tolist()}
    assert set(plan_step(wants, present, set(), 9, frozenset(), None).remove) == passed
    # Two units of window 9 need room: of the windows before the reader the latest goes first.
    tight = plan_step(wants, present, set(), 9, frozenset(), 8)
    assert set(tight.remove) == passed | set(order.window_units_of(7).tolist())
    assert set(tight.start) == set(order.window_units_of(9).tolist())


def test_kept_units_are_no_part_of_the_budget_and_never_deleted() -> None:
    order = make_order([16] * 40, 1, 16, 2)
    reader = Reader(
        credit_of(order, order.batches_before(1)), Demand(order, order.batches_before(1))
    )
    wants = needs([reader], 1)
    kept = frozenset(range(20))
    plan = plan_step(wants, kept, set(), 99, kept, 2)
    assert not plan.remove
    assert len(plan.start) == min(2, len(wants.needed - kept))


def test_two_readers_of_one_order_go_together_and_a_far_one_alone() -> None:
    order = make_order([16] * 60, 1, 16, 2)
    steps = order.batches_before(1)
    demand = Demand(order, steps)

    def at(window: int, run: str, seed: int = 3) -> Reader:
        step = next(s for s in range(steps) if order.window_of(s) == window)
        return Reader(credit_of(order, steps, step, step, run, seed), demand)

    near, ahead, far = at(4, "a"), at(6, "b"), at(20, "c")
    assert [len(group) for group in together([far, ahead, near], 2)] == [2, 1]
    wants = needs([near, ahead], 2)
    # None is served further than two windows before the slower one.
    assert {
        unit for window in (4, 5, 6) for unit in order.window_units_of(window).tolist()
    } <= wants.needed
    assert not wants.needed & set(order.window_units_of(7).tolist())
    waiting = needs([near, at(7, "b")], 2)
    assert not waiting.needed & set(order.window_units_of(7).tolist()), (
        "it would run away from the slower one"
    )
    assert set(order.window_units_of(8).tolist()) <= needs([ahead], 2).needed
    assert set(order.window_units_of(22).tolist()) <= needs([near, far], 2).needed
    # Who has taken all its steps holds nobody up.
    ended = Reader(credit_of(order, 10, 10, 10, "e"), Demand(order, 10))
    assert needs([ended, ahead], 2).wanted == needs([ahead], 2).wanted
    # Of another order nothing is shared.
    assert [len(group) for group in together([near, at(4, "d", seed=4)], 2)] == [1, 1]


def test_what_is_ready_is_counted_in_whole_windows() -> None:
    wants = Needs([[1, 2], [3, 4], [5]], [], frozenset())
    assert [windows_ready(wants, set(range(1, n))) for n in (2, 3, 4, 5, 6)] == [-1, 0, 0, 1, 2]
