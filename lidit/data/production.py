"""What the producer of a rolling family does next: which unit it computes, which it deletes. Files
are not its matter.

Three classes of units on disk, by the readers' needs:
- needed: by the window in use, which are never deleted, or by one of those ahead, which only make
  room for a unit that is needed sooner (after a return to a checkpoint).
- replayed: behind the reader, but not behind its newest checkpoint; kept while there is room, for
  the run may go back.
- kept: a fixed share of the family, and what readers have pinned; never deleted, and not counted in
  the budget. Everything else goes as soon as a living reader has passed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from lidit.data.credit import Credit
from lidit.data.demand import Demand, first_uses, unique


@dataclass(frozen=True)
class Reader:
    """One training that reads the family: its order and where it stands."""

    credit: Credit
    demand: Demand

    @property
    def window(self) -> int:
        return self.demand.window(self.credit.step)


@dataclass(frozen=True)
class Needs:
    """What all living readers need. wanted: units by distance in windows; replayed: in the order of
    their use.
    """

    wanted: list[list[int]]
    replayed: list[int]
    pinned: frozenset[int]

    @property
    def needed(self) -> set[int]:
        return {unit for units in self.wanted for unit in units}


@dataclass(frozen=True)
class Step:
    """Units to delete, then units to start. stuck: why not even the window in use
    can be computed.
    """

    remove: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    stuck: str = ""


def together(readers: Sequence[Reader], ahead: int) -> list[list[Reader]]:
    """Readers that share their units: of one order, and no further apart than the windows ahead.

    A reader far from the others goes at its own pace: to wait for it would stop them for its whole
    way.
    """
    groups: list[list[Reader]] = []
    for reader in sorted(readers, key=lambda reader: (reader.credit.order_key, reader.window)):
        slowest = groups[-1][0] if groups else None
        near = slowest is not None and reader.window - slowest.window <= ahead + 1
        if slowest is not None and near and slowest.credit.order_key == reader.credit.order_key:
            groups[-1].append(reader)
        else:
            groups.append([reader])
    return groups


def needs(readers: Sequence[Reader], ahead: int) -> Needs:
    """The readers' needs together. Of a group none is served further than `ahead` windows before
    its slowest.
    """
    wanted: list[list[int]] = [[] for _ in range(ahead + 1)]
    reading = [reader for reader in readers if reader.credit.step < reader.credit.steps]
    for group in together(reading, ahead):
        horizon = group[0].window + ahead
        for reader in group:
            if reader.window > horizon:  # it waits for the slowest, with what it has begun
                wanted[0] += reader.demand.carried(reader.window)
                continue
            listed = reader.demand.needed(reader.credit.step, horizon - reader.window)
            for distance, units in enumerate(listed):
                wanted[distance] += units
    replayed = [
        unit
        for reader in readers
        for unit in reader.demand.replayed(reader.credit.checkpoint, reader.credit.step)
    ]
    pinned = frozenset(
        unit for reader in readers if not reader.credit.finished for unit in reader.demand.pinned
    )
    return Needs(first_uses(wanted), unique(replayed), pinned)


def plan_step(
    wants: Needs,
    present: AbstractSet[int],
    in_flight: AbstractSet[int],
    slots: int,
    kept: AbstractSet[int],
    budget: int | None,
) -> Step:
    """The next deletions and starts.

    present: units on disk; in_flight: units being computed; slots: how many more may start now;
    budget: most units on disk or in flight, kept and pinned ones not counted.
    """
    needed, lasting = wants.needed, kept | wants.pinned
    behind = [unit for unit in wants.replayed if unit not in needed]
    loose = [unit for unit in sorted(present) if unit not in needed | lasting | set(behind)]
    step = Step(loose)
    room = None if budget is None else budget - len((present | in_flight) - lasting - set(loose))

    # What makes room, the last of the list first: the first of the next window is missed the most,
    # and of what lies behind, the units that a return to the checkpoint would begin with.
    spare = [
        unit
        for units in [*wants.wanted[1:], behind]
        for unit in units
        if unit in present and unit not in lasting
    ]
    pinned = [unit for unit in sorted(wants.pinned) if unit not in needed]
    for distance, units in enumerate([*wants.wanted, pinned]):
        # Units as near as this one no longer make room.
        spare = spare[
            sum(unit in spare for unit in units) if 0 < distance < len(wants.wanted) else 0 :
        ]
        for unit in units:
            if len(step.start) >= slots:
                return step
            if unit in present or unit in in_flight:
                continue
            if unit not in lasting and room is not None:
                while room <= 0 and spare:
                    step.remove.append(spare.pop())
                    room += 1
                if room <= 0:
                    if distance == 0 and not in_flight and not step.start:
                        return Step(step.remove, [], beyond_budget(wants, kept, budget))
                    continue
                room -= 1
            step.start.append(unit)
    return step


def beyond_budget(wants: Needs, kept: AbstractSet[int], budget: int | None) -> str:
    """Why a budget cannot do: the window in use alone needs more units at once; "" where it can."""
    at_once = len(set(wants.wanted[0]) - kept - wants.pinned)
    if budget is None or at_once <= budget:
        return ""
    return (
        f"online.budget: {budget} units are too few, the window in use needs {at_once} at once; "
        "raise it, or lower data.window_units. A rare aspect bucket keeps the units of many "
        "windows until a batch of it is full"
    )


def windows_ready(wants: Needs, present: AbstractSet[int]) -> int:
    """Windows beyond the one in use whose units are all there; -1 where that one is not complete
    itself.
    """
    ready = -1
    for units in wants.wanted:
        if not present >= set(units):
            break
        ready += 1
    return ready
