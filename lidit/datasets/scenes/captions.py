"""Captions of scenes in several styles, from alt text to long prose, and which styles training
never sees.

A style says what the scene's category is about and no more: colours only where the category names
colours, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from lidit.datasets.scenes.long_captions import LATE_STYLES
from lidit.datasets.scenes.phrases import core, noun, with_article
from lidit.datasets.scenes.scene import Scene, names_colours
from lidit.errors import InputError


@dataclass(frozen=True)
class Caption:
    text: str
    origin: str  # "original" or "synthetic"
    style: str


def bare(scene: Scene, rng: Random) -> str:
    return core(scene)


def photo(scene: Scene, rng: Random) -> str:
    """GenEval's own template."""
    return f"a photo of {core(scene)}"


def statement(scene: Scene, rng: Random) -> str:
    if scene.relation:
        first, second = (noun(scene, item) for item in scene.objects)
        return f"the {first} is {scene.relation} the {second}"
    return f"the picture shows {core(scene)}"


def dense(scene: Scene, rng: Random) -> str:
    """One full sentence, as a captioning model writes it."""
    if scene.relation:
        first, second = (with_article(noun(scene, item)) for item in scene.objects)
        return f"On a plain grey background, {first} has been placed {scene.relation} {second}."
    return f"This simple drawing shows {core(scene)} on a plain grey background."


def there_is(scene: Scene, rng: Random) -> str:
    many = scene.tag == "counting" and len(scene.objects) > 1
    return f"there {'are' if many else 'is'} {core(scene)}"


def relation_first(scene: Scene, rng: Random) -> str:
    """The relation before the objects it joins: "left of a blue square there is a red circle"."""
    first, second = (with_article(noun(scene, item)) for item in scene.objects)
    return f"{scene.relation} {second} there is {first}"


STYLES: dict[str, Callable[[Scene, Random], str]] = {
    "bare": bare,
    "photo": photo,
    "statement": statement,
    "dense": dense,
    "there_is": there_is,
    "relation_first": relation_first,
    **LATE_STYLES,
}
HELD_OUT_STYLES = ("there_is", "relation_first")


def style_fits(style: str, scene: Scene) -> bool:
    """Whether a style can say what the scene's category is about. Raises InputError for an unknown
    style.
    """
    if style not in STYLES:
        raise InputError(f"caption style {style!r} is unknown: choose from {', '.join(STYLES)}")
    if style == "relation_first":
        return scene.relation is not None
    return style not in LATE_STYLES or names_colours(scene.tag) or scene.tag == "size_attr"


def write_caption(scene: Scene, style: str, rng: Random) -> str:
    """The scene's caption in one style. Raises InputError where the style cannot describe the
    category.
    """
    if not style_fits(style, scene):
        raise InputError(
            f"caption style {style!r} cannot describe a {scene.tag} scene: choose other styles"
        )
    return STYLES[style](scene, rng)


@dataclass(frozen=True)
class CaptionStyles:
    """Styles to draw from: one original and one synthetic caption per scene (an empty tuple leaves
    that origin out).
    """

    original: tuple[str, ...]
    synthetic: tuple[str, ...]

    def captions(self, scene: Scene, rng: Random) -> list[Caption]:
        """The scene's captions, original first. Raises InputError where no style of an origin fits
        the category.
        """
        found = []
        for origin, styles in (("original", self.original), ("synthetic", self.synthetic)):
            fitting = [style for style in styles if style_fits(style, scene)]
            if styles and not fitting:
                raise InputError(
                    f"no {origin} caption style of {', '.join(styles)} can describe a "
                    f"{scene.tag} scene: "
                    f"add another style or leave the category out"
                )
            if fitting:
                style = rng.choice(fitting)
                found.append(Caption(write_caption(scene, style, rng), origin, style))
        if not found:
            raise InputError(
                "no caption styles given: name at least one original or synthetic style"
            )
        return found


def default_styles(layout: str) -> CaptionStyles:
    """Short captions for the simple layout (about seven tokens), two kinds of each origin for the
    free one.
    """
    if layout == "simple":
        return CaptionStyles(original=("bare",), synthetic=("statement",))
    return CaptionStyles(original=("bare", "photo"), synthetic=("statement", "dense"))
