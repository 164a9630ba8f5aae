"""Scores many images, sums them up as GenEval does, and puts the chance floor beside
every number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from random import Random

import numpy as np
from numpy.typing import NDArray

from lidit.datasets.scenes.generator import generate_scene
from lidit.datasets.scenes.shapes import vocabulary_for
from lidit.errors import InputError
from lidit.evals.scenes.detection import Analysis, analyse
from lidit.evals.scenes.generalisation import (
    SEEN,
    HeldOutComparison,
    compare_held_out,
    held_out_table,
)
from lidit.evals.scenes.scorer import Item, SceneScore, judge, score_image
from lidit.evals.statistics import Interval, bootstrap_mean, bootstrap_overall
from lidit.progress import SILENT, Progress


@dataclass(frozen=True)
class ScoredImage:
    """`filename`: where GenEval's layout has the image, relative to the folder of all images."""

    prompt: int
    item: Item
    score: SceneScore
    filename: str


@dataclass(frozen=True)
class TagScore:
    """One category: means over images with 95 % intervals (prompts resampled), and what another
    scene would score.
    """

    tag: str
    prompts: int
    images: int
    lax: Interval
    strict: Interval
    floor_lax: float
    floor_strict: float


@dataclass(frozen=True)
class Evaluation:
    """Per category, and overall = unweighted mean of the categories, as GenEval defines it.

    `correct_images` is the share of images, `correct_prompts` of prompts with any correct image
    (both lax).
    `by_held_out`: seen prompts against those that name a colour-shape pair never trained ("pair")
    and those in a caption template never trained ("template"), within the same categories.
    """

    tags: tuple[TagScore, ...]
    overall_lax: Interval
    overall_strict: Interval
    floor_lax: float
    floor_strict: float
    correct_images: float
    correct_prompts: float
    by_held_out: dict[str, HeldOutComparison]
    images: tuple[ScoredImage, ...]

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a tracker."""
        flat = {
            **with_bounds("overall/lax", self.overall_lax),
            **with_bounds("overall/strict", self.overall_strict),
            "overall/floor_lax": self.floor_lax,
            "overall/floor_strict": self.floor_strict,
            "overall/correct_images": self.correct_images,
            "overall/correct_prompts": self.correct_prompts,
        }
        for tag in self.tags:
            flat |= with_bounds(f"{tag.tag}/lax", tag.lax) | with_bounds(
                f"{tag.tag}/strict", tag.strict
            )
            flat |= {
                f"{tag.tag}/floor_lax": tag.floor_lax,
                f"{tag.tag}/floor_strict": tag.floor_strict,
            }
        for name, comparison in self.by_held_out.items():
            for rule, contrast in (
                ("lax", comparison.mean.lax),
                ("strict", comparison.mean.strict),
            ):
                flat |= with_bounds(f"held_out_{name}/{rule}_seen", contrast.seen)
                flat |= with_bounds(f"held_out_{name}/{rule}", contrast.held_out)
                flat |= with_bounds(f"held_out_{name}/{rule}_gap", contrast.gap)
        return flat

    def table(self) -> str:
        """Markdown tables: one row per category, then the overall mean; and seen prompts against
        held-out ones.
        """
        lines = [
            "| category | prompts | images | lax | strict | floor lax | floor strict |",
            "|---|---|---|---|---|---|---|",
        ]
        for t in self.tags:
            lines.append(
                f"| {t.tag} | {t.prompts} | {t.images} | {t.lax} | {t.strict} "
                f"| {t.floor_lax:.3f} | {t.floor_strict:.3f} |"
            )
        lines.append(
            f"| **overall** | {sum(t.prompts for t in self.tags)} | {len(self.images)} | "
            f"{self.overall_lax} | "
            f"{self.overall_strict} | {self.floor_lax:.3f} | {self.floor_strict:.3f} |"
        )
        if self.by_held_out:
            lines += ["", held_out_table(self.by_held_out)]
        return "\n".join(lines)


def with_bounds(name: str, interval: Interval) -> dict[str, float]:
    """An interval as a tracker takes it: NAME, NAME_low and NAME_high."""
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def evaluate_images(
    items: Sequence[Item],
    images: Iterable[Iterable[NDArray[np.uint8]]],
    floor: dict[str, tuple[float, float]] | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Scores the i-th of `images`, the uint8 [S, S, 3] images drawn for prompt `items[i]` (from
    `benchmark_prompts`).

    Images are taken one by one and not kept, so generators of any length will do. `floor`: from
    `chance_floor`, measured here where None. `progress` is told the number of images scored so far.
    Raises InputError for a prompt that has no image, and for an image that cannot be scored.
    """
    scored: list[ScoredImage] = []
    groups = 0
    for prompt, group in enumerate(images):
        groups += 1
        if groups > len(items):
            break
        item, number = items[prompt], -1
        for number, image in enumerate(group):
            size = len(image)
            scored.append(
                ScoredImage(
                    prompt, item, score_image(image, item), f"{prompt:05d}/samples/{number:04d}.png"
                )
            )
            progress.update(len(scored))
        if number < 0:
            raise InputError(f"prompt {prompt} ({item['prompt']!r}): no images")
    if not items or groups != len(items):
        more = " or more" if groups > len(items) else ""
        raise InputError(
            f"{len(items)} prompts and {groups}{more} groups of images: one group is needed "
            "per prompt"
        )
    return _sum_up(scored, chance_floor(items, size) if floor is None else floor)


def _sum_up(scored: list[ScoredImage], floor: dict[str, tuple[float, float]]) -> Evaluation:
    tags = []
    for tag in dict.fromkeys(image.item["tag"] for image in scored):
        chosen = [image for image in scored if image.item["tag"] == tag]
        prompts = [image.prompt for image in chosen]
        tags.append(
            TagScore(
                tag=tag,
                prompts=len(set(prompts)),
                images=len(chosen),
                lax=bootstrap_mean([image.score.lax for image in chosen], prompts),
                strict=bootstrap_mean([image.score.strict for image in chosen], prompts),
                floor_lax=floor[tag][0],
                floor_strict=floor[tag][1],
            )
        )
    correct_prompts = {image.prompt for image in scored if image.score.lax}
    return Evaluation(
        tags=tuple(tags),
        overall_lax=_overall(scored, [image.score.lax for image in scored]),
        overall_strict=_overall(scored, [image.score.strict for image in scored]),
        floor_lax=float(np.mean([tag.floor_lax for tag in tags])),
        floor_strict=float(np.mean([tag.floor_strict for tag in tags])),
        correct_images=float(np.mean([image.score.lax for image in scored])),
        correct_prompts=len(correct_prompts) / len({image.prompt for image in scored}),
        by_held_out=compare_held_out(
            [image.item["tag"] for image in scored],
            [image.item.get("held_out", SEEN) for image in scored],
            [image.prompt for image in scored],
            [(image.score.lax, image.score.strict) for image in scored],
        ),
        images=tuple(scored),
    )


def _overall(scored: Sequence[ScoredImage], right: Sequence[bool]) -> Interval:
    """Unweighted mean over categories of the mean over images; prompts are resampled within their
    category.
    """
    return bootstrap_overall(
        right, [image.item["tag"] for image in scored], [image.prompt for image in scored]
    )


def chance_floor(
    items: Sequence[Item], size: int, scenes: int = 64, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Per category, the mean (lax, strict) score of its prompts against true images of OTHER scenes
    of the category.

    The score of a model that draws perfect pictures and does not read its prompt. `scenes`: images
    per category, each judged under every prompt.
    """
    shown: dict[tuple[str, str], list[Analysis]] = {}
    scores: dict[str, list[tuple[bool, bool]]] = {}
    for item in items:
        tag, layout = item["tag"], item.get("layout", "free")
        if (tag, layout) not in shown:
            vocabulary, rng = (
                vocabulary_for(size, layout),
                Random(f"floor/{seed}/{layout}/{size}/{tag}"),
            )
            others = [
                generate_scene(rng, tag, size, layout, vocabulary, "any") for _ in range(scenes)
            ]
            shown[tag, layout] = [analyse(scene.render(), vocabulary) for scene in others]
        for analysis in shown[tag, layout]:
            score = judge(analysis, item)
            scores.setdefault(tag, []).append((score.lax, score.strict))
    means = {tag: np.mean(group, axis=0) for tag, group in scores.items()}
    return {tag: (float(lax), float(strict)) for tag, (lax, strict) in means.items()}


def write_results(path: Path, evaluation: Evaluation, images: str = "") -> None:
    """One JSON line per image in the format of GenEval's results file (`correct` is the lax rule),
    plus `strict`.

    images: the folder of all images, relative to that of `path`; file names are written with it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for image in evaluation.images:
            record = {
                "filename": str(PurePosixPath(images) / image.filename),
                "tag": image.item["tag"],
                "prompt": image.item["prompt"],
                "correct": image.score.lax,
                "reason": image.score.reason,
                "metadata": json.dumps(dict(image.item)),
                "details": json.dumps(image.score.details()),
                "strict": image.score.strict,
            }
            file.write(json.dumps(record) + "\n")
