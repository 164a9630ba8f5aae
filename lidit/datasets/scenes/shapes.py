"""Colours and shapes of the scene benchmark, and how much of each pixel a shape covers.

Every shape has the same area and its centroid at the origin, so neither size nor position gives a
shape away. Renderer and scorer draw with the same `coverage`, which is what makes analysis by
synthesis exact.

Coordinates are in pixels, x to the right and y down; pixel (i, j) is the square [j, j+1] x
[i, i+1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lidit.errors import InputError

BACKGROUND = 128
SUPERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 225),
    "yellow": (240, 215, 40),
    "purple": (150, 45, 190),
    "orange": (250, 140, 20),
    "cyan": (40, 205, 225),
    "white": (248, 248, 248),
    "pink": (250, 130, 195),
    "black": (12, 12, 12),
    "brown": (125, 75, 35),
}

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_STAR = np.array(
    [
        (radius * math.sin(math.pi * corner / 5), -radius * math.cos(math.pi * corner / 5))
        for corner, radius in enumerate((1.0, 0.42) * 5)
    ]
)
# the decagon of radii 1 and q has area 5 q sin(36 degrees)
_STAR /= math.sqrt(5 * 0.42 * math.sin(math.pi / 5))


def _circle(x: Floats, y: Floats) -> Mask:
    return x * x + y * y <= 1 / math.pi


def _square(x: Floats, y: Floats) -> Mask:
    return np.maximum(np.abs(x), np.abs(y)) <= 0.5


def _triangle(x: Floats, y: Floats) -> Mask:
    side = 2 / 3**0.25
    height = side * math.sqrt(3) / 2
    below_apex = y + 2 * height / 3
    return (below_apex <= height) & (np.abs(x) <= below_apex / math.sqrt(3))


def _cross(x: Floats, y: Floats) -> Mask:
    half = math.sqrt(9 / 5) / 2
    across, along = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return (along <= half) & (across <= half / 3)


def _star(x: Floats, y: Floats) -> Mask:
    inside = np.zeros(np.broadcast(x, y).shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(_STAR, np.roll(_STAR, -1, axis=0)):
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _diamond(x: Floats, y: Floats) -> Mask:
    return np.abs(x) + np.abs(y) <= math.sqrt(0.5)


def _ring(x: Floats, y: Floats) -> Mask:
    outer = 1 / (0.7 * math.pi)  # squared radius; the hole takes 30 % of the outer disc
    squared = x * x + y * y
    return (squared <= outer) & (squared >= 0.3 * outer)


@dataclass(frozen=True)
class Shape:
    """`inside` on unit-area coordinates; `reach`: radius of a disc that holds the shape, over
    sqrt(area).
    """

    inside: Callable[[Floats, Floats], Mask]
    reach: float


SHAPES: dict[str, Shape] = {
    "circle": Shape(_circle, 0.57),
    "square": Shape(_square, 0.72),
    "triangle": Shape(_triangle, 0.90),
    "cross": Shape(_cross, 0.76),
    "star": Shape(_star, 0.90),
    "diamond": Shape(_diamond, 0.72),
    "ring": Shape(_ring, 0.68),
}


@dataclass(frozen=True)
class Vocabulary:
    """The colours and shapes a benchmark draws from; the scorer looks for these and no others."""

    colours: tuple[str, ...]
    shapes: tuple[str, ...]

    def held_out_pairs(self) -> frozenset[tuple[str, str]]:
        """(colour, shape) pairs never shown in training: one per shape, each with another colour
        where they suffice.
        """
        last = len(self.colours) - 1
        return frozenset(
            (self.colours[(last - index) % len(self.colours)], shape)
            for index, shape in enumerate(self.shapes)
        )


def vocabulary_for(size: int, layout: str = "free") -> Vocabulary:
    """What can be told apart at an image side of `size` pixels.

    The simple layout always uses six colours and four shapes. Raises InputError for an unknown
    layout.
    """
    colours, shapes = tuple(COLOURS), tuple(SHAPES)
    if layout not in ("simple", "free"):
        raise InputError(f"layout {layout!r}: choose 'simple' or 'free'")
    if layout == "simple" or size < 48:
        return Vocabulary(colours[:6], shapes[:4])
    if size < 64:
        return Vocabulary(colours[:8], shapes[:5])
    return Vocabulary(colours[:8], shapes[:6])


def coverage(
    shape: str, x: float, y: float, area: float, window: tuple[int, int, int, int]
) -> Floats:
    """Share of each pixel of `window` = (top, left, height, width) inside a shape. Returns
    [height, width] in [0, 1].

    `x`, `y` are the centroid in pixels, `area` is in square pixels. 4x4 samples per pixel.
    """
    top, left, height, width = window
    steps = (np.arange(SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    scale = 1 / math.sqrt(area)
    u = ((left + np.arange(width)[:, None] + steps).reshape(1, -1) - x) * scale  # [1, 4 width]
    v = ((top + np.arange(height)[:, None] + steps).reshape(-1, 1) - y) * scale  # [4 height, 1]
    inside = SHAPES[shape].inside(u, v)
    # [4 height, 4 width] -> [height, 4, width, 4]: the samples of one pixel on axes 1 and 3
    return inside.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean(axis=(1, 3))
