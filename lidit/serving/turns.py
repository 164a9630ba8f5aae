"""Which queue is next when a turn of one costs more than a turn of another, and who goes first
within one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Generic, TypeVar

Key = TypeVar("Key")
SHORT = 0.5  # of the mean: whoever asks for no more shall not wait for the others' work


def line_up(work: Sequence[float], short_first: bool) -> tuple[list[int], bool]:
    """The order in which those who wait get places, and whether there are short ones among them.

    work: of each one's whole request, in the order they came. Short ones go first; but with
    `short_first` false the one that came first does, so that no stream of short ones keeps it out.
    """
    most = SHORT * fmean(work)
    short = [place for place, units in enumerate(work) if units <= most]
    if not short:
        return list(range(len(work))), False
    front = short if short_first else [0, *(place for place in short if place)]
    others = [place for place in range(len(work)) if place not in set(front)]
    return [*front, *others], True


class DeficitRoundRobin(Generic[Key]):
    """Every queue with work gets the same share of the cost, whatever its single turn costs.

    A queue that comes to the front may spend as much as the dearest turn costs, and what is left
    over later (Shreedhar and Varghese, 1995). A queue without work loses what it has left, so
    idling saves up nothing.
    """

    def __init__(self) -> None:
        self._left: OrderedDict[Key, int] = OrderedDict()  # the front is first

    def choose(self, costs: Mapping[Key, int]) -> Key:
        """The queue whose turn it is, charged with its cost. `costs`: of the next turn of each
        queue with work, > 0.
        """
        for gone in self._left.keys() - costs.keys():
            del self._left[gone]
        for come in costs:
            self._left.setdefault(come, 0)
        share = max(costs.values())
        while True:
            front = next(iter(self._left))
            if self._left[front] >= costs[front]:
                self._left[front] -= costs[front]
                return front
            self._left.move_to_end(front)
            self._left[next(iter(self._left))] += share
