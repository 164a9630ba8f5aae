"""Seen against held-out prompts: no gap where only categories differ, the right one where what is
held out fails.
"""

from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from lidit.datasets.scenes.benchmark import benchmark_prompts
from lidit.datasets.scenes.generator import generate_scene
from lidit.datasets.scenes.shapes import vocabulary_for
from lidit.evals.scenes.evaluation import Evaluation, evaluate_images
from lidit.evals.scenes.generalisation import compare_held_out

GROUPS = ("none", "pair", "none", "template")


def picture_of(item: dict, number: int) -> NDArray[np.uint8]:
    rng = Random(number)
    while True:
        scene = generate_scene(rng, item["tag"], 32, "free", vocabulary_for(32), "any")
        if scene.geneval("")["include"] == item["include"]:
            return scene.render()


def evaluated(right: tuple[str, ...]) -> Evaluation:
    """Every prompt of the categories in `right` is drawn perfectly, the others not at all."""
    tags = ("single_object", "two_object", "colors")
    items = benchmark_prompts(32, "free", seed=0, per_tag=8, tags=tags)
    blank = np.full((32, 32, 3), 128, np.uint8)
    images = [
        [picture_of(item, n) if item["tag"] in right else blank] for n, item in enumerate(items)
    ]
    return evaluate_images(items, images, floor=dict.fromkeys(tags, (0.0, 0.0)))


@pytest.mark.parametrize("right", [("colors",), ("single_object",)])
def test_what_depends_on_the_category_alone_shows_no_gap(right: tuple[str, ...]) -> None:
    """Only "colors" names colours, so only it has prompts with a held-out pair: over all categories
    they differ.
    """
    result = evaluated(right)
    assert set(result.by_held_out) == {"pair", "template"}
    for comparison in result.by_held_out.values():
        for row in (*comparison.categories, comparison.mean):
            for rule in (row.lax, row.strict):
                assert (rule.gap.low, rule.gap.value, rule.gap.high) == (0, 0, 0)
    assert [row.category for row in result.by_held_out["pair"].categories] == ["colors"]
    assert len(result.by_held_out["template"].categories) == 3
    mean = result.by_held_out["template"].mean
    assert mean.lax.seen.value == mean.lax.held_out.value == pytest.approx(1 / 3)
    assert mean.prompts == (6 + 6 + 4, 6)


def images_of(
    prompts: int, images: int, chance: dict[str, float]
) -> tuple[list, list, list, NDArray]:
    """Of two categories "easy" is always right, "hard" by the group's chance, alike for all images
    of a prompt.
    """
    rng = np.random.default_rng(0)
    rows = []
    for number in range(prompts):
        group, category = GROUPS[number % 4], ("easy", "hard")[number // 4 % 2]
        right = category == "easy" or rng.random() < chance[group]
        rows += [(category, group, number, [right, right and number % 8 < 6])] * images
    categories, groups, numbers, correct = (list(column) for column in zip(*rows))
    return categories, groups, numbers, np.array(correct)


def test_a_gap_is_found_with_its_interval() -> None:
    found = compare_held_out(*images_of(800, 1, {"none": 0.9, "pair": 0.3, "template": 0.9}))
    pair, template = found["pair"].mean, found["template"].mean
    assert pair.lax.gap.low < 0.3 < pair.lax.gap.high  # half of 0.9 - 0.3: "easy" has none
    assert pair.lax.gap.low > 0.15
    assert template.lax.gap.low < 0 < template.lax.gap.high
    easy, hard = found["pair"].categories
    assert (easy.lax.gap.low, easy.lax.gap.high) == (0, 0)
    assert hard.lax.gap.value == pytest.approx(2 * pair.lax.gap.value)
    assert pair.strict != pair.lax


def test_the_interval_has_the_width_of_the_statistics() -> None:
    """Against the normal approximation of a difference of two shares."""
    (category, groups, prompts, correct) = images_of(
        1600, 1, {"none": 0.5, "pair": 0.5, "template": 0.5}
    )
    row = compare_held_out(category, groups, prompts, correct)["pair"].categories[1]
    seen, held_out = row.prompts
    width = 2 * 1.96 * np.sqrt(0.25 / seen + 0.25 / held_out)
    assert (seen, held_out) == (400, 200)
    assert row.lax.gap.high - row.lax.gap.low == pytest.approx(width, rel=0.06)


def test_seen_and_held_out_are_resampled_apart() -> None:
    """The same draws for both would let equal groups differ by nothing, with certainty."""
    right = np.tile([[1, 1], [0, 0]], (40, 1))
    found = compare_held_out(["a"] * 80, ["none"] * 40 + ["pair"] * 40, range(80), right)
    gap = found["pair"].mean.lax.gap
    assert gap.low < -0.15 < gap.value == 0 < 0.15 < gap.high


def test_more_images_of_the_same_prompts_do_not_narrow_the_interval() -> None:
    chance = {"none": 0.7, "pair": 0.4, "template": 0.5}
    one, four = (compare_held_out(*images_of(160, images, chance)) for images in (1, 4))
    assert one == four


def test_a_group_of_one_prompt_is_not_compared() -> None:
    rows = [
        ("a", "none", 0),
        ("a", "none", 1),
        ("a", "pair", 2),
        ("a", "template", 3),
        ("a", "template", 4),
    ]
    categories, groups, prompts = (list(column) for column in zip(*rows))
    assert set(compare_held_out(categories, groups, prompts, np.ones((5, 2)))) == {"template"}
    assert compare_held_out(["a"] * 4, ["none"] * 4, range(4), np.ones((4, 2))) == {}


def test_table_and_tracker_have_the_comparison() -> None:
    result = evaluated(("colors",))
    lines = result.table().splitlines()
    row = result.by_held_out["template"].mean
    assert (
        f"| template | **mean** | 16, 6 | {row.lax.seen} | {row.lax.held_out} | "
        f"{row.lax.gap} |" in "\n".join(lines)
    )
    assert sum(line.startswith("| pair ") for line in lines) == 2
    assert sum(line.startswith("| template ") for line in lines) == 4
    metrics = result.metrics()
    assert (
        metrics["held_out_template/lax_seen"]
        == metrics["held_out_template/lax"]
        == pytest.approx(1 / 3)
    )
    assert metrics["held_out_template/strict_gap_high"] == 0
    assert {f"held_out_pair/lax_gap{end}" for end in ("", "_low", "_high")} <= set(metrics)
