"""Every row once, never more than the budget, little padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lidit.text.batching import BATCH_COST_TOKENS, padding_of, plan_batches


@given(lengths=st.lists(st.integers(1, 300), max_size=200), budget=st.integers(1, 2000))
def test_every_row_once_and_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        longest = max(lengths[row] for row in rows)
        assert len(rows) * longest <= budget or len(rows) == 1
    assert batches == plan_batches(list(lengths), budget)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7), budget=st.integers(40, 200))
def test_no_other_cut_of_the_sorted_rows_costs_less(lengths: list[int], budget: int) -> None:
    ordered = sorted(lengths)

    def cost(batches: list[list[int]]) -> int:
        return sum(len(b) * max(b) + BATCH_COST_TOKENS for b in batches)

    best = min(
        cost(parts)
        for cuts in itertools.product([0, 1], repeat=len(ordered) - 1)
        for parts in [_cut(ordered, cuts)]
        if all(len(p) * max(p) <= budget for p in parts)
    )
    found = cost([[lengths[row] for row in rows] for rows in plan_batches(lengths, budget)])
    # rows of one length stay in one group, which can cost a little against cutting anywhere
    assert found <= best + BATCH_COST_TOKENS * len(set(lengths))


def _cut(items: list[int], cuts: tuple[int, ...]) -> list[list[int]]:
    parts = [[items[0]]]
    for item, cut in zip(items[1:], cuts):
        if cut:
            parts.append([])
        parts[-1].append(item)
    return parts


@pytest.mark.parametrize("budget", [2048, 8192, 65536])
def test_a_unit_of_mixed_captions_wastes_under_five_percent(budget: int) -> None:
    generator = np.random.default_rng(0)
    short, long = (
        generator.integers(5, 14, 700),
        generator.normal(80, 25, 324).clip(20, 256).astype(int),
    )
    lengths = [*short.tolist(), *long.tolist()]
    assert padding_of(lengths, plan_batches(lengths, budget)).waste < 0.05
    arrival = [list(range(i, min(i + 32, len(lengths)))) for i in range(0, len(lengths), 32)]
    generator.shuffle(lengths)
    assert padding_of(lengths, arrival).waste > 0.3  # what sorting saves
