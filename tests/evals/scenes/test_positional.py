"""The positional curve: flat on truth, recovers an injected bias; prompts from T2I-CompBench's
words.
"""

import dataclasses
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from lidit.datasets.scenes.generator import generate_scene
from lidit.datasets.scenes.shapes import vocabulary_for
from lidit.errors import InputError
from lidit.evals.scenes.evaluation import evaluate_images
from lidit.evals.scenes.positional import (
    PositionalCurve,
    plot_curves,
    plot_labels,
    positional_curve,
    positions_table,
    read_segment_scores,
    scene_curves,
)
from lidit.evals.suites.segments import read_word_pool, segment_prompts


def curve_of_scenes(tag: str, size: int, chances: list[float], prompts: int) -> PositionalCurve:
    """Segment i is drawn in a wrong colour with probability chances[i]."""
    vocabulary, items, images = vocabulary_for(size), [], []
    for number in range(prompts):
        rng = Random(f"{tag}{number}")
        scene = generate_scene(rng, tag, size, "free", vocabulary, "any")
        items.append(scene.geneval("") | {"prompt": str(number)})
        drawn = []
        for item, chance in zip(scene.objects, chances):
            taken = {other.colour for other in scene.objects if other.shape == item.shape}
            wrong = rng.choice([colour for colour in vocabulary.colours if colour not in taken])
            drawn.append(dataclasses.replace(item, colour=wrong) if rng.random() < chance else item)
        images.append([dataclasses.replace(scene, objects=tuple(drawn)).render()])
    return scene_curves(evaluate_images(items, images, floor={tag: (0.0, 0.0)}))[tag]


@pytest.mark.parametrize(
    ("tag", "size"), [("list4", 32), ("list4", 64), ("list8", 32), ("list8", 64)]
)
def test_truth_is_flat(tag: str, size: int) -> None:
    curve = curve_of_scenes(tag, size, [0.0] * 8, prompts=20)
    assert curve.segments == int(tag[4:])
    assert [interval.value for interval in curve.by_position] == [1.0] * curve.segments
    assert (curve.drop.low, curve.drop.high) == (0.0, 0.0)


@pytest.mark.parametrize(("tag", "prompts"), [("list4", 150), ("list8", 80)])
def test_injected_bias_is_recovered(tag: str, prompts: int) -> None:
    count = int(tag[4:])
    chances = np.linspace(0.1, 0.7, count).tolist()
    curve = curve_of_scenes(tag, 32, chances, prompts)
    quartiles = (1 - np.array(chances)).reshape(4, -1).mean(axis=1)
    assert [interval.value for interval in curve.by_quartile] == pytest.approx(
        quartiles.tolist(), abs=0.13
    )
    assert curve.drop.low > 0.2
    assert all(interval.low < interval.value < interval.high for interval in curve.by_position)


def test_quartiles_and_clusters() -> None:
    scores = np.tile([1, 0.5, 1, 0, 0, 0, 1, 0], (6, 1))
    curve = positional_curve(scores, [0, 0, 1, 1, 2, 2])
    assert [interval.value for interval in curve.by_quartile] == [0.75, 0.5, 0.0, 0.5]
    assert curve.drop.value == 0.25
    assert (curve.prompts, curve.images) == (3, 6)
    assert curve.metrics()["position_2_of_8"] == 0.5
    short = positional_curve([[1, 0, 1], [1, 1, 0]], ["a", "b"])
    assert short.by_quartile == ()
    assert short.drop.value == 0.5
    with pytest.raises(InputError, match="within 0 and 1"):
        positional_curve([[0.5, 1.5]], ["a"])


def test_the_interval_of_the_drop_is_told_everywhere() -> None:
    """It decides whether there is a bias: in the table, in the legend and among the numbers of a
    tracker.
    """
    four = positional_curve([[1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0]], [0, 1, 2])
    eight = positional_curve(np.random.default_rng(0).uniform(size=(6, 8)), range(6))
    pair = positional_curve([[1, 0], [1, 1]], [0, 1])
    drop = f"{four.drop}"
    assert four.drop.low < four.drop.value < four.drop.high
    (label,) = plot_labels({"list4": four})
    assert label == f"list4 (3 prompts), drop {drop}"
    rows = positions_table({"list4": four, "list8": eight, "list2": pair}).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert f"| list4 | **drop**, first quartile less last | 3 | 3 | {drop} |" in rows
    assert f"| list4 | position 4 of 4 | 3 | 3 | {four.by_position[3]} |" in rows
    assert f"| list8 | quartile 3 | 6 | 6 | {eight.by_quartile[2]} |" in rows
    assert f"| list2 | **drop**, first position less last | 2 | 2 | {pair.drop} |" in rows
    assert [
        sum(row.startswith(f"| {name} ") for row in rows) for name in ("list4", "list8", "list2")
    ] == [5, 13, 3]
    metrics = eight.metrics()
    assert (metrics["drop_low"], metrics["drop_high"]) == (eight.drop.low, eight.drop.high)
    assert (metrics["quartile_2_low"], metrics["quartile_2_high"]) == (
        eight.by_quartile[1].low,
        eight.by_quartile[1].high,
    )


def test_plot_is_a_picture_of_the_curve(tmp_path: Path) -> None:
    flat = positional_curve(np.ones((4, 4)), range(4))
    falling = positional_curve(np.tile([1, 0.7, 0.4, 0.1], (4, 1)), range(4))
    plot_curves(tmp_path / "plots" / "flat.png", {"model": flat})
    plot_curves(tmp_path / "plots" / "falling.png", {"model": falling})
    pictures = [
        np.asarray(Image.open(tmp_path / "plots" / name)) for name in ("flat.png", "falling.png")
    ]
    assert pictures[0].shape == (480, 720, 4)
    assert (pictures[0] != pictures[1]).any()
    with pytest.raises(InputError, match="no positional curves"):
        plot_curves(tmp_path / "none.png", {})


def test_segment_scores_of_an_outside_scorer(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"prompt": 0, "scores": [1, 0.5]}\n{"prompt": 1, "scores": [0.25, 0]}\n')
    scores, prompts = read_segment_scores(path)
    assert (scores.tolist(), prompts) == ([[1, 0.5], [0.25, 0]], [0, 1])
    for text, message in (
        (
            '{"prompt": 0, "scores": [1, 0.5]}\n{"prompt": 1, "scores": [1]}',
            r"jsonl:2: 1 scores, 2 in the lines before",
        ),
        ('{"prompt": 0}', r"jsonl:1: expected"),
        ("", "empty"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_segment_scores(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_segment_scores(tmp_path / "absent.jsonl")


LINES = [
    "a red apple and a green bench",
    "a blue fire truck and a red old cat",
    "a red dog and a blue apple.",
] * 40


def test_words_are_read_and_accidents_dropped(tmp_path: Path) -> None:
    path = tmp_path / "color.txt"
    path.write_text(
        "\n".join(
            [
                *LINES,
                "a bathroom sink and a white toilet",
                "two cats",
                "a red house with a door and a red dog",
            ]
        )
    )
    pool = read_word_pool([path])
    assert pool.attributes == ("blue", "green", "red")
    assert pool.nouns == ("apple", "bench", "dog", "fire truck", "old cat", "sink", "toilet")
    path.write_text("nothing here\n")
    with pytest.raises(InputError, match=r"color\.txt: no line of the form"):
        read_word_pool([path])


def test_prompts_of_public_words(shared_data: Path) -> None:
    folder = shared_data / "t2i_compbench"
    pools = {
        name: read_word_pool([folder / f"{name}_train.txt", folder / f"{name}_val.txt"])
        for name in ("color", "shape", "texture")
    }
    assert set(pools["color"].attributes) == {
        "red",
        "brown",
        "blue",
        "green",
        "yellow",
        "white",
        "black",
        "gold",
        "pink",
        "silver",
        "purple",
    }
    assert set(pools["texture"].attributes) == {
        "metallic",
        "wooden",
        "fabric",
        "leather",
        "plastic",
        "fluffy",
        "glass",
        "rubber",
    }
    assert len(pools["shape"].nouns) > 300
    items = segment_prompts(pools, count=1000, segments=4, seed=0)
    assert len({item["prompt"] for item in items}) == 1000
    assert items == segment_prompts(pools, count=1000, segments=4, seed=0)
    for item in items:
        phrases = [part["question"].removesuffix("?") for part in item["segments"]]
        assert item["prompt"] == f"{', '.join(phrases[:3])} and {phrases[3]}"
        assert len({part["noun"] for part in item["segments"]}) == 4
        assert all(
            part["attribute"] in pools[part["category"]].attributes for part in item["segments"]
        )
    assert all(item["prompt"].count(" and ") == 1 for item in segment_prompts(pools, 50, 8, 0))
    with pytest.raises(InputError, match="2 to 8 segments"):
        segment_prompts(pools, 1, 9, 0)
