"""Words and noun phrases that caption styles are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lidit.datasets.scenes.scene import Scene, SceneObject, names_colours

COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
PLACES = (
    ("the upper left corner", "the top", "the upper right corner"),
    ("the left side", "the centre", "the right side"),
    ("the lower left corner", "the bottom", "the lower right corner"),
)


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith(("s", "x")) else f"{shape}s"


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def attribute(scene: Scene, item: SceneObject) -> str:
    """What the scene's category says about an object: its colour, its size, or nothing."""
    if names_colours(scene.tag):
        return item.colour
    return item.size if scene.tag == "size_attr" else ""


def noun(scene: Scene, item: SceneObject) -> str:
    return f"{attribute(scene, item)} {item.shape}".strip()


def join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def core(scene: Scene, attributes: bool = True) -> str:
    """The scene in the fewest words: "a red circle and a blue square", "a circle left of a cross",
    "three rings".
    """
    if scene.tag == "counting":
        shape, count = scene.objects[0].shape, len(scene.objects)
        return f"{COUNTS[count]} {shape if count == 1 else plural(shape)}"
    phrases = [
        with_article(noun(scene, item) if attributes else item.shape) for item in scene.objects
    ]
    return f" {scene.relation} ".join(phrases) if scene.relation else join(phrases)


def references(scene: Scene) -> list[str]:
    """How a later sentence points at each object: "the circle", or "the second circle" where there
    are several.
    """
    totals, seen, names = Counter(item.shape for item in scene.objects), Counter[str](), []
    for item in scene.objects:
        names.append(
            f"the {ORDINALS[seen[item.shape]]} {item.shape}"
            if totals[item.shape] > 1
            else f"the {item.shape}"
        )
        seen[item.shape] += 1
    return names


def place(scene: Scene, item: SceneObject) -> str:
    """Which ninth of the image holds the object's centre."""
    row, column = (min(2, int(3 * value / scene.side)) for value in (item.y, item.x))
    return PLACES[row][column]
