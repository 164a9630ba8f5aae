"""Where the objects of a scene stand: fixed slots ("simple") or free placement without contact
("free").

Simple is what a model of a million parameters learns in minutes; free is the benchmark.
"""

from __future__ import annotations

import math
from random import Random

from lidit.datasets.scenes.shapes import SHAPES
from lidit.errors import InputError

SMALL, LARGE = 0.115, 0.19  # radius of the equal-area disc over the image side
LIST_AREA_FACTOR = 0.62  # area factor of lists with more than five objects
SIMPLE_SINGLE, SIMPLE_PAIR, SIMPLE_FOUR = 0.20, 0.15, 0.13
JITTER_SINGLE, JITTER_PAIR = 1.2 / 32, 0.6 / 32  # share of the image side: 1.2 and 0.6 pixels at 32
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TRIES = 60


def disc_area(radius: float, size: int) -> float:
    """Area in square pixels of a disc whose radius is `radius` x image side."""
    return math.pi * (radius * size) ** 2


def simple_positions(
    count: int, relation: str | None, size: int, rng: Random
) -> list[tuple[float, float]]:
    """Centres in mention order: one object in the middle, two in slots side by side or one above
    the other, three or four in the quarters of the image.

    Without a relation the objects stand in reading order.
    """
    middle, low, high = 0.5 * size, 0.25 * size, 0.75 * size
    if count == 1:
        slots, jitter = [(middle, middle)], JITTER_SINGLE * size
    elif count == 2:
        relation = relation or rng.choice(("left of", "above"))
        slots = (
            [(low, middle), (high, middle)]
            if relation in ("left of", "right of")
            else [(middle, low), (middle, high)]
        )
        if relation in ("right of", "below"):
            slots.reverse()
        jitter = JITTER_PAIR * size
    elif count <= 4:
        slots = [(low, low), (high, low), (low, high), (high, high)][:count]
        jitter = JITTER_PAIR * size
    else:
        raise InputError(
            f"the simple layout holds one to four objects, not {count}: use layout='free'"
        )
    return [(x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)) for x, y in slots]


def free_positions(
    shapes: list[str], areas: list[float], relation: str | None, size: int, rng: Random
) -> list[tuple[float, float]] | None:
    """Centres in mention order, anywhere in the image, with a gap of max(1.6 px, 0.05 S); None
    where no room was found.

    With a relation there are two objects and the offset on the minor axis is at most a quarter of
    the distance, so the relation holds and no other does under GenEval's rule.
    """
    reaches = [SHAPES[shape].reach * math.sqrt(area) for shape, area in zip(shapes, areas)]
    gap = max(1.6, 0.05 * size)
    # the largest first, while there is room
    order = sorted(range(len(shapes)), key=lambda index: -reaches[index])
    for _ in range(TRIES):
        placed: dict[int, tuple[float, float]] = {}
        for index in order:
            spot = _free_spot(index, placed, reaches, gap, size, relation, rng)
            if spot is None:
                break
            placed[index] = spot
        if len(placed) == len(shapes):
            return [placed[index] for index in range(len(shapes))]
    return None


def _free_spot(
    index: int,
    placed: dict[int, tuple[float, float]],
    reaches: list[float],
    gap: float,
    size: int,
    relation: str | None,
    rng: Random,
) -> tuple[float, float] | None:
    low, high = reaches[index] + 0.5, size - reaches[index] - 0.5
    if low > high:
        return None
    for _ in range(30):
        x, y = rng.uniform(low, high), rng.uniform(low, high)
        if relation is not None and placed:
            ((px, py),) = placed.values()
            towards = relation if index == 0 else OPPOSITE[relation]
            # along the relation's axis the draw is free, across it bounded: a free draw would
            # hardly ever qualify
            along = px if towards in ("left of", "right of") else py
            reach = abs((x if towards in ("left of", "right of") else y) - along) * 0.25
            if towards in ("left of", "right of"):
                y = min(max(py + rng.uniform(-reach, reach), low), high)
            else:
                x = min(max(px + rng.uniform(-reach, reach), low), high)
            if not holds(towards, (x, y), (px, py)):
                continue
        if all(
            math.hypot(x - px, y - py) >= reaches[index] + reaches[other] + gap
            for other, (px, py) in placed.items()
        ):
            return x, y
    return None


def holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether `first` stands in `relation` to `second` beyond doubt: minor-axis offset at most 25 %
    of the distance.
    """
    dx, dy = first[0] - second[0], first[1] - second[1]
    major, minor = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    towards = -1 if relation in ("left of", "above") else 1
    return major * towards > 0 and abs(minor) <= 0.25 * math.hypot(dx, dy)
