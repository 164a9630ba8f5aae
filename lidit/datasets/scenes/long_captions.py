"""Captions whose attributes come after their nouns, and long prose: the regime LI-DiT's refiner
claims to matter in.

Under a causal mask a noun's state cannot hold what a later clause says about it (paper 2.2, A.3).
`long_before` is prose too, with the attributes in front of the nouns: the control that separates
length from order.
"""

from __future__ import annotations

from random import Random

from lidit.datasets.scenes.phrases import COUNTS, ORDINALS, attribute, core, place, references
from lidit.datasets.scenes.scene import Scene, names_colours

OPENINGS = (
    "The image is a simple flat illustration on a plain grey background.",
    "This is a minimalist drawing, set against an even grey ground without any texture.",
    "A clean, computer-made picture with a uniform grey backdrop.",
)
CLOSINGS = (
    "There is nothing else in the picture.",
    "The rest of the picture is left empty.",
    "No shadows or outlines are visible.",
)


def clauses(scene: Scene, rng: Random) -> str:
    """ "a circle and a square; the square is blue, the circle is red": clauses in random order."""
    said = [
        f"{name} is {attribute(scene, item)}"
        for name, item in zip(references(scene), scene.objects)
    ]
    rng.shuffle(said)
    return f"{core(scene, attributes=False)}; {', '.join(said)}"


def ordinals(scene: Scene, rng: Random) -> str:
    """ "a circle and a square. the first is red, the second is blue." """
    said = [
        f"the {ordinal} is {attribute(scene, item)}"
        for ordinal, item in zip(ORDINALS, scene.objects)
    ]
    return f"{core(scene, attributes=False)}. {', '.join(said)}."


def sentences(scene: Scene, rng: Random) -> str:
    """ "It shows two shapes: a circle and a square. The square is painted blue. The circle is
    red.": the shortest prose whose attributes come in sentences of their own, in random order.
    """
    return f"{_shown(scene, attributes=False)} {' '.join(_capitalised(_looks(scene, rng)))}"


def long(scene: Scene, rng: Random) -> str:
    """Prose in which the objects come first, their places next, and their attributes last, one
    sentence each.
    """
    places = _places(scene, rng)
    return _prose(scene, rng, places + _looks(scene, rng), attributes=False)


def long_before(scene: Scene, rng: Random) -> str:
    """The same prose with every attribute in front of its noun, where the objects
    are named first.
    """
    return _prose(scene, rng, _places(scene, rng), attributes=True)


def _looks(scene: Scene, rng: Random) -> list[str]:
    said = [
        f"{name} {rng.choice(_verbs(scene))} {attribute(scene, item)}."
        for name, item in zip(references(scene), scene.objects)
    ]
    rng.shuffle(said)
    return said


def _verbs(scene: Scene) -> tuple[str, ...]:
    if names_colours(scene.tag):
        return ("is", "is painted", "has been coloured", "shows an even")
    return ("is", "looks", "has been drawn")


def _places(scene: Scene, rng: Random) -> list[str]:
    said = [
        f"{name} {rng.choice(('sits near', 'can be found at', 'is placed towards'))} "
        f"{place(scene, item)}."
        for name, item in zip(references(scene), scene.objects)
    ]
    rng.shuffle(said)
    return said


def _prose(scene: Scene, rng: Random, said: list[str], attributes: bool) -> str:
    told = [_shown(scene, attributes), *_capitalised(said)]
    return " ".join([rng.choice(OPENINGS), *told, rng.choice(CLOSINGS)])


def _shown(scene: Scene, attributes: bool) -> str:
    count = len(scene.objects)
    return (
        f"It shows {COUNTS[count]} {'shape' if count == 1 else 'shapes'}: "
        f"{core(scene, attributes)}."
    )


def _capitalised(said: list[str]) -> list[str]:
    return [sentence[0].upper() + sentence[1:] for sentence in said]


LATE_STYLES = {
    "clauses": clauses,
    "ordinals": ordinals,
    "sentences": sentences,
    "long": long,
    "long_before": long_before,
}
