"""Seen prompts against held-out ones, within the same categories.

Only categories that have both are compared: a mean over all categories of one group and some of the
other would show a gap wherever categories differ in difficulty, however well the model does on
prompts it never saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lidit.evals.statistics import RESAMPLES, Interval

SEEN = "none"
HELD_OUT = ("pair", "template")
FEWEST_PROMPTS = 2  # resampling a single prompt has no spread, so its interval would be a point
SEED = 0


@dataclass(frozen=True)
class Contrast:
    """Score of the seen prompts, of the held-out ones, and the first less the second. Without a gap
    it holds 0.
    """

    seen: Interval
    held_out: Interval
    gap: Interval


@dataclass(frozen=True)
class HeldOutScores:
    """Scores of one category, or of the unweighted mean over categories; prompts are resampled
    within each group.
    """

    category: str
    prompts: tuple[int, int]
    lax: Contrast
    strict: Contrast


@dataclass(frozen=True)
class HeldOutComparison:
    """The seen prompts against one group of held-out ones: `mean` over `categories`, those with
    prompts of both.
    """

    categories: tuple[HeldOutScores, ...]
    mean: HeldOutScores


def compare_held_out(
    categories: Sequence[str], groups: Sequence[str], prompts: Sequence[int], correct: ArrayLike
) -> dict[str, HeldOutComparison]:
    """Per group of held-out prompts, how much better the seen ones of the same categories do.

    Of every image its category, group ("none" is seen, "pair", "template"), prompt and, `correct`
    [images, 2], whether it is right under the lax and the strict rule. A category counts from two
    prompts of each group on; a group without such a category is left out.
    """
    rights, prompt = np.asarray(correct, dtype=float), np.asarray(prompts)
    rng = np.random.default_rng(SEED)
    strata: dict[tuple[str, str], tuple[int, NDArray[np.float64]]] = {}
    for stratum in dict.fromkeys(zip(categories, groups)):
        rows = [place for place, one in enumerate(zip(categories, groups)) if one == stratum]
        count = len(set(prompt[rows].tolist()))
        if count >= FEWEST_PROMPTS:
            strata[stratum] = count, _resampled_means(rights[rows], prompt[rows], rng)
    comparisons = {}
    for group in HELD_OUT:
        common = [
            name
            for name in dict.fromkeys(categories)
            if {(name, SEEN), (name, group)} <= strata.keys()
        ]
        if common:
            pairs = [(strata[name, SEEN], strata[name, group]) for name in common]
            counts = [(seen[0], held_out[0]) for seen, held_out in pairs]
            means = [(seen[1], held_out[1]) for seen, held_out in pairs]
            comparisons[group] = HeldOutComparison(
                tuple(_score(*row) for row in zip(common, counts, means)),
                _score("mean", tuple(np.sum(counts, axis=0).tolist()), np.mean(means, axis=0)),
            )
    return comparisons


def _resampled_means(
    rights: NDArray[np.float64], prompts: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Means over images [1 + RESAMPLES, 2]: as they are, then with whole prompts drawn with
    replacement.
    """
    _, cluster = np.unique(prompts, return_inverse=True)
    count = cluster.max() + 1
    sums = np.zeros((count, 3))
    np.add.at(sums, cluster, np.column_stack([rights, np.ones(len(rights))]))
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    totals = np.concatenate([np.ones((1, count)), weights]) @ sums
    return totals[:, :2] / totals[:, 2:]


def _score(
    category: str, prompts: tuple[int, int], means: Iterable[NDArray[np.float64]]
) -> HeldOutScores:
    seen, held_out = means
    lax, strict = (
        Contrast(*(_interval(values[:, rule]) for values in (seen, held_out, seen - held_out)))
        for rule in (0, 1)
    )
    return HeldOutScores(category, prompts, lax, strict)


def _interval(means: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(means[1:], [2.5, 97.5])
    return Interval(float(means[0]), float(low), float(high))


def held_out_table(comparisons: dict[str, HeldOutComparison]) -> str:
    """A Markdown table: per held-out group a row for each category and one for their mean."""
    lines = [
        "| held out | category | prompts seen, held out | lax seen | lax held out | lax gap "
        "| strict seen | strict held out | strict gap |",
        "|" + "---|" * 9,
    ]
    for group, comparison in comparisons.items():
        for row in (*comparison.categories, comparison.mean):
            name = "**mean**" if row is comparison.mean else row.category
            cells = [
                f"{rule.seen} | {rule.held_out} | {rule.gap}" for rule in (row.lax, row.strict)
            ]
            lines.append(
                f"| {group} | {name} | {row.prompts[0]}, {row.prompts[1]} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)
