"""A scene: objects whose shape, colour, size and place are known, its image, and its record in
GenEval's schema.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lidit.datasets.scenes.shapes import BACKGROUND, COLOURS, SHAPES, coverage
from lidit.errors import InputError

COLOURED_TAGS = frozenset({"colors", "color_attr", "color_attr_position"})
RELATION_TAGS = frozenset({"position", "color_attr_position"})
SIMPLE_TAGS = (
    "single_object",
    "two_object",
    "colors",
    "position",
    "color_attr",
    "color_attr_position",
)
FREE_TAGS = (*SIMPLE_TAGS, "counting", "size_attr", "list4", "list8")
LONGEST_LIST, LONGEST_SIMPLE_LIST = 8, 4


def list_length(tag: str) -> int | None:
    """Segments of a `listK` tag (the positional curve's prompts), None for every other tag."""
    match = re.fullmatch(r"list(\d+)", tag)
    return int(match[1]) if match and 2 <= int(match[1]) <= LONGEST_LIST else None


def names_colours(tag: str) -> bool:
    return tag in COLOURED_TAGS or list_length(tag) is not None


def check_tag(tag: str, layout: str) -> None:
    """Raises InputError for a category that does not exist or that the layout cannot show."""
    length = list_length(tag)
    if length is not None and length <= (
        LONGEST_SIMPLE_LIST if layout == "simple" else LONGEST_LIST
    ):
        return
    if tag in (SIMPLE_TAGS if layout == "simple" else FREE_TAGS):
        return
    if tag in FREE_TAGS or length is not None:
        known = ", ".join(SIMPLE_TAGS)
        raise InputError(
            f"category {tag!r} needs layout='free'; the simple layout has {known}, list2 to list4"
        )
    raise InputError(
        f"category {tag!r} is unknown: choose from {', '.join(FREE_TAGS)} or list2 to "
        f"list{LONGEST_LIST}"
    )


@dataclass(frozen=True)
class SceneObject:
    """One shape. `x`, `y`: centroid in pixels; `area` in square pixels; `size`: "small", "large",
    or "" where fixed.
    """

    shape: str
    colour: str
    x: float
    y: float
    area: float
    size: str = ""


@dataclass(frozen=True)
class Scene:
    """Objects in the order in which a caption mentions them; `relation`: where the first stands to
    the second.
    """

    tag: str
    side: int
    objects: tuple[SceneObject, ...]
    relation: str | None = None

    def render(self) -> NDArray[np.uint8]:
        """The image, uint8 [side, side, 3]: antialiased shapes on a flat grey ground."""
        image = np.full((self.side, self.side, 3), float(BACKGROUND))
        for item in self.objects:
            reach = SHAPES[item.shape].reach * math.sqrt(item.area) + 1
            top, left = max(0, math.floor(item.y - reach)), max(0, math.floor(item.x - reach))
            bottom, right = (
                min(self.side, math.ceil(item.y + reach)),
                min(self.side, math.ceil(item.x + reach)),
            )
            alpha = coverage(
                item.shape, item.x, item.y, item.area, (top, left, bottom - top, right - left)
            )
            patch = image[top:bottom, left:right]
            patch += alpha[:, :, None] * (np.array(COLOURS[item.colour], dtype=float) - patch)
        return np.rint(image).astype(np.uint8)

    def geneval(self, prompt: str) -> dict[str, Any]:
        """What an image must show to follow `prompt`, in GenEval's schema (`size` is our addition
        to a clause).
        """
        record: dict[str, Any] = {"tag": self.tag}
        if self.tag == "counting":
            shape, count = self.objects[0].shape, len(self.objects)
            record["include"] = [{"class": shape, "count": count}]
            record["exclude"] = [{"class": shape, "count": count + 1}]
        else:
            # GenEval puts the reference object first and lets the second clause point back to it
            order = reversed(self.objects) if self.relation else self.objects
            record["include"] = [self._clause(item) for item in order]
            if self.relation:
                record["include"][1]["position"] = [self.relation, 0]
        return record | {"prompt": prompt}

    def _clause(self, item: SceneObject) -> dict[str, Any]:
        clause: dict[str, Any] = {"class": item.shape, "count": 1}
        if names_colours(self.tag):
            clause["color"] = item.colour
        if self.tag == "size_attr":
            clause["size"] = item.size
        return clause

    def shows(self, pairs: frozenset[tuple[str, str]]) -> bool:
        """Whether any object is one of the (colour, shape) `pairs`."""
        return any((item.colour, item.shape) in pairs for item in self.objects)
