"""The scene benchmark's prompts, a pure function of their arguments."""

from __future__ import annotations

from random import Random
from typing import Any

from lidit.datasets.scenes.captions import (
    HELD_OUT_STYLES,
    default_styles,
    style_fits,
    write_caption,
)
from lidit.datasets.scenes.generator import SMALLEST_SIDE, generate_scene, seeded_random
from lidit.datasets.scenes.scene import FREE_TAGS, SIMPLE_TAGS, check_tag, names_colours
from lidit.datasets.scenes.shapes import Vocabulary, vocabulary_for
from lidit.errors import InputError


def benchmark_prompts(
    size: int, layout: str, seed: int, per_tag: int, tags: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Up to `per_tag` distinct prompts of each category in GenEval's schema, with three keys more.

    `held_out` is "none" (training's own pairs and templates), "pair" (names a held-out colour-shape
    pair; only where the category names colours) or "template" (a held-out caption style); `unseen`
    is whether it is not "none"; `layout` tells the scorer which vocabulary to look for. Half of the
    prompts are seen, the rest is shared out. Raises InputError as `write_scene_shards` does.
    """
    vocabulary = vocabulary_for(size, layout)
    if per_tag < 1:
        raise InputError(f"per_tag={per_tag}: must be at least 1")
    if size < SMALLEST_SIDE[layout]:
        raise InputError(
            f"size={size}: must be at least {SMALLEST_SIDE[layout]} (layout {layout!r})"
        )
    items = []
    for tag in tags or (SIMPLE_TAGS if layout == "simple" else FREE_TAGS):
        check_tag(tag, layout)
        rng = seeded_random("prompts", layout, size, seed, tag)
        known: set[str] = set()
        for number in range(per_tag):
            held_out = ("none", "pair", "none", "template")[number % 4]
            if held_out == "pair" and not names_colours(tag):
                held_out = "none"
            item = _new_prompt(rng, tag, size, layout, vocabulary, held_out, known)
            if item is not None:
                items.append(item)
    return items


def _new_prompt(
    rng: Random,
    tag: str,
    size: int,
    layout: str,
    vocabulary: Vocabulary,
    held_out: str,
    known: set[str],
) -> dict[str, Any] | None:
    """A prompt not in `known` (which it joins), None where the category has no more."""
    for _ in range(200):
        scene = generate_scene(
            rng, tag, size, layout, vocabulary, "unseen" if held_out == "pair" else "train"
        )
        styles = default_styles(layout).original
        if held_out == "template":
            styles = tuple(style for style in HELD_OUT_STYLES if style_fits(style, scene))
        prompt = write_caption(scene, rng.choice(styles), rng)
        if prompt not in known:
            known.add(prompt)
            return scene.geneval(prompt) | {
                "unseen": held_out != "none",
                "held_out": held_out,
                "layout": layout,
            }
    return None
