"""Prompts of k adjective-noun segments from T2I-CompBench's own attributes and nouns (paper A.3).

The paper's 1,000 prompts are not public; its printed examples have four segments of one attribute
and one noun.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lidit.datasets.scenes.phrases import join, with_article
from lidit.errors import InputError

PAIR = re.compile(
    r"an? ([a-z]+) ([a-z]+(?: [a-z]+)?) and an? ([a-z]+) ([a-z]+(?: " r"[a-z]+)?)\.?", re.IGNORECASE
)
# of all matches: rarer adjectives are rooms and verbs that fit the pattern by accident
LEAST_SHARE = 0.0075
NOT_IN_NOUNS = frozenset(
    {"a", "an", "and", "the", "with", "in", "on", "behind", "lie", "lay", "sit", "of"}
)
LONGEST = 8


@dataclass(frozen=True)
class WordPool:
    """Attributes and nouns of one category, each sorted."""

    attributes: tuple[str, ...]
    nouns: tuple[str, ...]


def read_word_pool(paths: Sequence[Path]) -> WordPool:
    """The words of all lines "a ADJECTIVE NOUN and a ADJECTIVE NOUN" in T2I-CompBench prompt files
    of one category.

    Raises InputError for a file that cannot be read and for files without such lines.
    """
    attributes, nouns = Counter[str](), set[str]()
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        for line in lines:
            match = PAIR.fullmatch(line.strip().lower())
            if match and not NOT_IN_NOUNS & set((match[2] + " " + match[4]).split()):
                attributes.update((match[1], match[3]))
                nouns |= {match[2], match[4]}
    common = {
        word for word, count in attributes.items() if count >= LEAST_SHARE * attributes.total()
    }
    nouns -= common
    if not common or not nouns:
        names = ", ".join(str(path) for path in paths)
        raise InputError(
            f'{names}: no line of the form "a red apple and a green bench"; give '
            "T2I-CompBench files"
        )
    return WordPool(tuple(sorted(common)), tuple(sorted(nouns)))


def segment_prompts(
    pools: Mapping[str, WordPool], count: int, segments: int, seed: int
) -> list[dict[str, Any]]:
    """`count` distinct prompts of `segments` segments (the paper's reading: 4; stress: 8).

    `pools`: category (color, shape, texture) -> words; every segment draws its category. Nouns
    differ within a prompt. An item has `tag`, `prompt` and `segments`: [{category, attribute, noun,
    question}], as BLIP-VQA is asked. Raises InputError for numbers out of range or pools too small.
    """
    if count < 1 or not 2 <= segments <= LONGEST:
        raise InputError(
            f"count={count}, segments={segments}: at least 1 prompt and 2 to {LONGEST} segments"
        )
    if not pools or sum(len(pool.nouns) for pool in pools.values()) < 2 * segments:
        raise InputError(
            f"too few nouns for prompts of {segments} segments: give more T2I-CompBench "
            "prompt files"
        )
    rng = Random(f"segments/{seed}/{segments}")
    items: dict[str, dict[str, Any]] = {}
    for _ in range(100 * count):
        chosen: dict[str, dict[str, str]] = {}
        while len(chosen) < segments:
            category = rng.choice(sorted(pools))
            attribute, noun = (
                rng.choice(pools[category].attributes),
                rng.choice(pools[category].nouns),
            )
            phrase = with_article(f"{attribute} {noun}")
            chosen.setdefault(
                noun,
                {
                    "category": category,
                    "attribute": attribute,
                    "noun": noun,
                    "question": f"{phrase}?",
                },
            )
        prompt = join(
            [with_article(f"{part['attribute']} {part['noun']}") for part in chosen.values()]
        )
        items.setdefault(
            prompt, {"tag": f"list{segments}", "prompt": prompt, "segments": list(chosen.values())}
        )
        if len(items) == count:
            return list(items.values())
    raise InputError(f"the word pools allow fewer than {count} prompts of {segments} segments")
