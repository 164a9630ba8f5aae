"""Which captions share a forward pass: sorted by length, so that almost nothing is padding.

Legend: D distinct lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BATCH_COST_TOKENS = 64  # a forward pass costs about this many tokens before the first one


@dataclass(frozen=True)
class Padding:
    """Tokens that carry text, and the tokens that were computed for them."""

    useful: int = 0
    computed: int = 0

    def __add__(self, other: Padding) -> Padding:
        return Padding(self.useful + other.useful, self.computed + other.computed)

    @property
    def waste(self) -> float:
        """Share of the computed tokens that is padding."""
        return 1 - self.useful / self.computed if self.computed else 0.0


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Rows (indices into `lengths`) of each batch, longest first. A pure function of its arguments.

    No batch computes more than `token_budget` tokens, padding included, unless a single row is
    longer. Among the ways to cut the sorted rows, the one with the fewest padded tokens, plus
    `BATCH_COST_TOKENS` per batch, is taken.
    """
    if not lengths:
        return []
    order = np.argsort(np.asarray(lengths), kind="stable")
    values, counts = np.unique(np.asarray(lengths)[order], return_counts=True)  # [D], [D]
    ends = np.concatenate([[0], np.cumsum(counts)])
    batches: list[list[int]] = []
    for low, high in _groups(values, counts, token_budget):
        rows = order[ends[low] : ends[high]]
        number = _batches_of(len(rows), int(values[high - 1]), token_budget)
        batches += [part.tolist() for part in np.array_split(rows, number)]
    return batches[::-1]


def plan_packed(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Rows of each batch, in order and about equally long, where captions need no padding.

    No batch has more than `token_budget` tokens unless a single row has.
    """
    total = sum(lengths)
    share = total / max(-(-total // token_budget), 1)
    batches: list[list[int]] = []
    filled, done = 0, 0  # tokens of the open batch, tokens of all
    for row, length in enumerate(lengths):
        if not batches or filled + length > token_budget or done >= share * len(batches):
            batches.append([])
            filled = 0
        batches[-1].append(row)
        filled, done = filled + length, done + length
    return batches


def padding_of(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> Padding:
    computed = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)
    return Padding(sum(lengths[row] for rows in batches for row in rows), computed)


def _batches_of(rows: int, longest: int, token_budget: int) -> int:
    return -(-rows // max(token_budget // longest, 1))


def _groups(values: np.ndarray, counts: np.ndarray, token_budget: int) -> list[tuple[int, int]]:
    """Ranges of distinct lengths that are padded to one length, by dynamic programming over where
    to cut.
    """
    total = np.concatenate([[0], np.cumsum(counts)])
    best = np.zeros(len(values) + 1)
    cut = np.zeros(len(values) + 1, dtype=np.int64)
    for high in range(1, len(values) + 1):
        longest = int(values[high - 1])
        rows = total[high] - total[:high]  # for every place where the group could begin
        number = -(-rows // max(token_budget // longest, 1))
        cost = best[:high] + rows * longest + BATCH_COST_TOKENS * number
        cut[high] = int(np.argmin(cost))
        best[high] = cost[cut[high]]
    groups = []
    high = len(values)
    while high:
        groups.append((int(cut[high]), high))
        high = int(cut[high])
    return groups[::-1]
