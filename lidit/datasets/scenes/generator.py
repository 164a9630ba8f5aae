"""Draws scenes: which objects, in which colours and sizes, and where. A pure function of the
generator passed in.
"""

from __future__ import annotations

from random import Random
from typing import Literal

from lidit.datasets.scenes.layouts import (
    LARGE,
    LIST_AREA_FACTOR,
    RELATIONS,
    SIMPLE_FOUR,
    SIMPLE_PAIR,
    SIMPLE_SINGLE,
    SMALL,
    disc_area,
    free_positions,
    simple_positions,
)
from lidit.datasets.scenes.scene import RELATION_TAGS, Scene, SceneObject, check_tag, list_length
from lidit.datasets.scenes.shapes import Vocabulary
from lidit.errors import InputError

# raise when the same seed begins to give other scenes; it is part of every seed
GENERATOR_VERSION = 1
SMALLEST_SIDE = {"simple": 16, "free": 32}  # pixels, by layout
Split = Literal["train", "unseen", "any"]
RADII = {"small": SMALL, "large": LARGE}
Pair = tuple[str, str]


def seeded_random(*parts: object) -> Random:
    """A generator seeded by words; Python hashes a text seed with SHA-512, the same on every
    platform.
    """
    return Random("/".join(str(part) for part in ("lidit", GENERATOR_VERSION, *parts)))


def generate_scene(
    rng: Random, tag: str, size: int, layout: str, vocabulary: Vocabulary, split: Split = "train"
) -> Scene:
    """One scene of a category.

    `size`: image side in pixels. `split`: "train" shows no held-out (colour, shape) pair, "unseen"
    shows at least one, "any" does not care. Raises InputError for a category the layout cannot show
    or an image too small for it.
    """
    check_tag(tag, layout)
    held_out = vocabulary.held_out_pairs()
    relation = rng.choice(RELATIONS) if tag in RELATION_TAGS else None
    for _ in range(1000):
        pairs = _generate_pairs(rng, tag, vocabulary)
        shown = any(pair in held_out for pair in pairs)
        if (split == "train" and shown) or (split == "unseen" and not shown):
            continue
        scene = _place(rng, tag, pairs, relation, size, layout)
        if scene is not None:
            return scene
    raise InputError(
        f"no room for a {tag} scene at {size} pixels with layout={layout!r}: use a larger size"
    )


def _generate_pairs(rng: Random, tag: str, vocabulary: Vocabulary) -> list[Pair]:
    """(colour, shape) of every object, in mention order."""
    length = list_length(tag)
    if length is not None:
        # Segments differ as (colour, shape); either repeats only where there are more segments than
        # values
        while True:
            pairs = list(
                zip(
                    _spread(rng, vocabulary.colours, length),
                    _spread(rng, vocabulary.shapes, length),
                )
            )
            if len(set(pairs)) == length:
                return pairs
    if tag == "counting":
        shape, count = rng.choice(vocabulary.shapes), rng.randint(1, 4)
        return [(rng.choice(vocabulary.colours), shape) for _ in range(count)]
    if tag in ("single_object", "colors"):
        return [(rng.choice(vocabulary.colours), rng.choice(vocabulary.shapes))]
    # two colours even where the caption names none: neighbours of one colour would merge in a
    # blurred image
    return list(zip(rng.sample(vocabulary.colours, 2), rng.sample(vocabulary.shapes, 2)))


def _spread(rng: Random, values: tuple[str, ...], count: int) -> list[str]:
    """`count` of `values` in random order, each as often as any other, give or take one."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += rng.sample(values, min(len(values), count - len(drawn)))
    rng.shuffle(drawn)
    return drawn


def _place(
    rng: Random, tag: str, pairs: list[Pair], relation: str | None, size: int, layout: str
) -> Scene | None:
    if layout == "simple":
        radius = (
            SIMPLE_SINGLE if len(pairs) == 1 else SIMPLE_PAIR if len(pairs) == 2 else SIMPLE_FOUR
        )
        area = disc_area(radius, size)
        places = simple_positions(len(pairs), relation, size, rng)
        objects = [
            SceneObject(shape, colour, x, y, area) for (colour, shape), (x, y) in zip(pairs, places)
        ]
        return Scene(tag, size, tuple(objects), relation)
    sizes = _draw_sizes(rng, tag, len(pairs))
    factor = LIST_AREA_FACTOR if len(pairs) > 5 else 1.0
    areas = [disc_area(RADII[label], size) * factor * rng.uniform(0.9, 1.1) for label in sizes]
    free = free_positions([shape for _, shape in pairs], areas, relation, size, rng)
    if free is None:
        return None
    objects = [
        SceneObject(shape, colour, x, y, area, label)
        for (colour, shape), (x, y), area, label in zip(pairs, free, areas, sizes)
    ]
    return Scene(tag, size, tuple(objects), relation)


def _draw_sizes(rng: Random, tag: str, count: int) -> list[str]:
    if tag == "size_attr":
        return rng.sample(("small", "large"), 2)
    if count <= 2:
        return [rng.choice(("small", "large")) for _ in range(count)]
    return ["small"] * count
