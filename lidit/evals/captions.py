"""Captions of scenes in several styles, from alt text to long prose, and which styles training never sees.

A style is a way of saying what the scene's category names: colours only where the category is about colours, and so on.
Styles in which attributes come after their nouns exist because LI-DiT's claim about causal states is about exactly
those (paper 2.2 and A.3): a causal LLM's state of the noun cannot hold what is said later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from lidit.errors import InputError
from lidit.evals.scene import Scene, SceneObject, names_colours

COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


@dataclass(frozen=True)
class Caption:
    text: str
    origin: str  # "original" or "synthetic"
    style: str


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith(("s", "x")) else f"{shape}s"


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def attributes(scene: Scene, item: SceneObject) -> str:
    """What the scene's category says about an object: its colour, its size, or nothing."""
    if names_colours(scene.tag):
        return item.colour
    return item.size if scene.tag == "size_attr" else ""


def noun(scene: Scene, item: SceneObject) -> str:
    return f"{attributes(scene, item)} {item.shape}".strip()


def join(parts: Sequence[str], separator: str = ", ") -> str:
    return parts[0] if len(parts) == 1 else f"{separator.join(parts[:-1])} and {parts[-1]}"


def core(scene: Scene) -> str:
    """The scene in the fewest words: "a red circle and a blue square", "a circle left of a cross", "three rings"."""
    if scene.tag == "counting":
        shape, count = scene.objects[0].shape, len(scene.objects)
        return f"{COUNTS[count]} {shape if count == 1 else plural(shape)}"
    phrases = [with_article(noun(scene, item)) for item in scene.objects]
    return f" {scene.relation} ".join(phrases) if scene.relation else join(phrases)


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
}
HELD_OUT_STYLES = ("there_is", "relation_first")


def style_fits(style: str, scene: Scene) -> bool:
    """Whether a style can say what the scene's category is about. Raises InputError for an unknown style."""
    if style not in STYLES:
        raise InputError(f"caption style {style!r} is unknown: choose from {', '.join(STYLES)}")
    if style == "relation_first":
        return scene.relation is not None
    return True


def write_caption(scene: Scene, style: str, rng: Random) -> str:
    """The scene's caption in one style. Raises InputError where the style cannot describe the category."""
    if not style_fits(style, scene):
        raise InputError(f"caption style {style!r} cannot describe a {scene.tag} scene: choose other styles")
    return STYLES[style](scene, rng)


@dataclass(frozen=True)
class CaptionStyles:
    """Styles to draw from: one original and one synthetic caption per scene (an empty tuple leaves that origin out)."""

    original: tuple[str, ...]
    synthetic: tuple[str, ...]

    def captions(self, scene: Scene, rng: Random) -> list[Caption]:
        """The scene's captions, original first. Raises InputError where no style of an origin fits the category."""
        found = []
        for origin, styles in (("original", self.original), ("synthetic", self.synthetic)):
            fitting = [style for style in styles if style_fits(style, scene)]
            if styles and not fitting:
                raise InputError(
                    f"no {origin} caption style of {', '.join(styles)} can describe a {scene.tag} scene: "
                    f"add another style or leave the category out"
                )
            if fitting:
                style = rng.choice(fitting)
                found.append(Caption(write_caption(scene, style, rng), origin, style))
        if not found:
            raise InputError("no caption styles given: name at least one original or synthetic style")
        return found


def default_styles(layout: str) -> CaptionStyles:
    """Short captions for the simple layout (about seven tokens), two kinds of each origin for the free one."""
    if layout == "simple":
        return CaptionStyles(original=("bare",), synthetic=("statement",))
    return CaptionStyles(original=("bare", "photo"), synthetic=("statement", "dense"))
