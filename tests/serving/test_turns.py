"""Sizes share the device by cost; the row cap follows what was measured."""

from __future__ import annotations

from collections import Counter

import pytest

from lidit.serving.admission import stepper_of
from lidit.serving.profile import Capacity, Pass, brisk_rows, row_cap, still_pays
from lidit.serving.turns import DeficitRoundRobin, line_up
from tests.helpers.random_pipeline import random_pipeline


@pytest.mark.parametrize(
    "costs", [{"small": 1, "large": 16}, {"a": 3, "b": 7, "c": 11}, {"only": 5}]
)
def test_queues_with_work_get_the_same_share(costs: dict[str, int]) -> None:
    turns: DeficitRoundRobin[str] = DeficitRoundRobin()
    spent: Counter[str] = Counter()
    for _ in range(1000):
        chosen = turns.choose(costs)
        spent[chosen] += costs[chosen]
        assert max(spent[key] for key in costs) - min(spent[key] for key in costs) <= 3 * max(
            costs.values()
        )
    assert set(spent) == set(costs)


def test_idling_saves_nothing_up() -> None:
    turns: DeficitRoundRobin[str] = DeficitRoundRobin()
    for _ in range(100):
        assert turns.choose({"busy": 4}) == "busy"
    first = [turns.choose({"busy": 4, "new": 4}) for _ in range(6)]
    assert Counter(first) == {"busy": 3, "new": 3}


PASSES = [Pass(1, 1.0, 10), Pass(2, 1.2, 20), Pass(4, 1.6, 40), Pass(8, 3.19, 80)]


@pytest.mark.parametrize(("memory", "cap"), [(100, 4), (40, 4), (39, 2), (5, 1)])
def test_the_cap_ends_where_rows_stop_paying_or_memory_ends(memory: int, cap: int) -> None:
    assert row_cap(PASSES, memory) == cap


@pytest.mark.parametrize(
    ("passes", "rows"),
    [
        (PASSES, 7),  # 3 s lie nine tenths of the way from 1.6 to 3.19
        (PASSES[:3], 4),
        ([Pass(2, 1.0, 0), Pass(4, 4.5, 0)], 3),
        ([Pass(2, 1.0, 0)], 2),
    ],
)
def test_a_brisk_pass_takes_at_most_three_times_one_images(passes: list[Pass], rows: int) -> None:
    assert brisk_rows(passes) == rows


@pytest.mark.parametrize(
    ("work", "short_first", "expected"),
    [
        ([32, 16, 8, 32], True, ([2, 0, 1, 3], True)),
        ([32, 16, 8, 32], False, ([0, 2, 1, 3], True)),
        ([8, 32, 32, 32], False, ([0, 1, 2, 3], True)),
        ([25, 25, 25], True, ([0, 1, 2], False)),
        ([8, 8, 8, 8, 16], True, ([0, 1, 2, 3, 4], False)),  # nobody asks for much more than others
        ([5], True, ([0], False)),
    ],
)
def test_short_requests_go_first_and_the_oldest_every_other_time(
    work: list[int], short_first: bool, expected: tuple[list[int], bool]
) -> None:
    assert line_up(work, short_first) == expected


@pytest.mark.parametrize(
    ("seconds", "pays"),
    [
        ((1.0, 2.0), True),
        ((1.0, 2.2, 2.6), True),
        ((1.0, 2.0, 4.0), False),
        ((1.0, 2.2, 8.0, 9.0), False),
    ],
)
def test_measuring_ends_after_two_passes_that_gain_nothing(
    seconds: tuple[float, ...], pays: bool
) -> None:
    assert still_pays([Pass(2**power, taken, 0) for power, taken in enumerate(seconds)]) == pays


def test_the_cap_of_a_size_is_measured_once() -> None:
    stepper = stepper_of(random_pipeline("clean"))
    passes = []
    stepper.model.transformer.register_forward_pre_hook(
        lambda _, inputs: passes.append(inputs[0].shape)
    )
    capacity = Capacity(stepper)
    cap = capacity((16, 16))
    rows = {shape[0] for shape in passes}
    assert cap in rows
    assert rows == {2 ** (1 + power) for power in range(len(rows))}  # 1, 2, 4, ... guided images
    assert len(rows) > 2
    assert {shape[2:] for shape in passes} == {(16, 16)}
    before = len(passes)
    assert capacity((16, 16)) == cap
    assert len(passes) == before
