"""The scorer against images whose truth is known: right ones, damaged ones, wrong captions, and
images of nothing.
"""

import json
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from lidit.datasets.scenes.benchmark import benchmark_prompts
from lidit.datasets.scenes.generator import generate_scene
from lidit.datasets.scenes.layouts import OPPOSITE
from lidit.datasets.scenes.scene import FREE_TAGS, SIMPLE_TAGS, Scene, list_length
from lidit.datasets.scenes.shapes import Vocabulary, vocabulary_for
from lidit.errors import InputError
from lidit.evals.scenes.detection import Analysis, Found, analyse, noise_level
from lidit.evals.scenes.evaluation import chance_floor, evaluate_images, write_results
from lidit.evals.scenes.scorer import judge, relative_position, score_image

Image = NDArray[np.uint8]
SETTINGS = [(32, "simple"), (32, "free"), (64, "free")]
MAIN_TAGS = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
    "size_attr",
)
PER_TAG = 8


@cache
def scenes(size: int, layout: str, per_tag: int = PER_TAG) -> list[Scene]:
    tags = SIMPLE_TAGS if layout == "simple" else FREE_TAGS
    vocabulary = vocabulary_for(size, layout)
    return [
        generate_scene(Random(f"{tag}{index}"), tag, size, layout, vocabulary, "any")
        for tag in tags
        for index in range(per_tag)
    ]


def wrong_item(item: Mapping[str, Any], vocabulary: Vocabulary, rng: Random) -> dict[str, Any]:
    """The record of a caption that is wrong in one thing, the thing the category is about
    (wrong-caption control).

    single_object, two_object: one shape; counting: one more or less; colors and lists: another
    colour; position: the opposite relation; color_attr, size_attr: colours or sizes swapped.
    """
    tag, include = item["tag"], [dict(clause) for clause in item["include"]]
    changed = {**item, "include": include}
    if tag == "counting":
        clause = include[0]
        clause["count"] += 1 if clause["count"] == 1 else rng.choice((-1, 1))
        changed["exclude"] = [{"class": clause["class"], "count": clause["count"] + 1}]
    elif any("position" in clause for clause in include):
        for clause in include:
            if "position" in clause:
                clause["position"] = [OPPOSITE[clause["position"][0]], clause["position"][1]]
    elif tag in ("color_attr", "size_attr"):
        key = "color" if tag == "color_attr" else "size"
        include[0][key], include[1][key] = include[1][key], include[0][key]
    elif tag == "colors" or list_length(tag):
        clause = rng.choice(include)
        shown = {other["color"] for other in include if other["class"] == clause["class"]}
        clause["color"] = rng.choice(
            [colour for colour in vocabulary.colours if colour not in shown]
        )
    else:
        shown = {clause["class"] for clause in include}
        rng.choice(include)["class"] = rng.choice(
            [shape for shape in vocabulary.shapes if shape not in shown]
        )
    return changed


def as_image(values: NDArray[np.float64]) -> Image:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def scores(
    size: int, layout: str, damage: Callable[[Image, int], Image], tags: tuple[str, ...] = FREE_TAGS
) -> NDArray:
    """[scenes, (lax, strict, lax under a wrong caption)] of damaged images."""
    vocabulary, rows = vocabulary_for(size, layout), []
    for index, scene in enumerate(scenes(size, layout)):
        if scene.tag in tags:
            found = analyse(damage(scene.render(), index), vocabulary)
            item = scene.geneval("")
            right, wrong = (
                judge(found, item),
                judge(found, wrong_item(item, vocabulary, Random(index))),
            )
            rows.append((right.lax, right.strict, wrong.lax))
    return np.array(rows, dtype=float)


def add_noise(deviation: float) -> Callable[[Image, int], Image]:
    def damage(image: Image, index: int) -> Image:
        return as_image(
            image + np.random.default_rng(index).normal(0, 255 * deviation, image.shape)
        )

    return damage


def blur(image: Image, index: int) -> Image:
    return as_image(ndimage.gaussian_filter(image.astype(float), (1, 1, 0)))


@pytest.mark.parametrize(("size", "layout"), [*SETTINGS, (48, "free")])
def test_clean_images_are_right_and_wrong_captions_wrong(size: int, layout: str) -> None:
    result = scores(size, layout, lambda image, index: image)
    assert result.mean(axis=0).tolist() == [1, 1, 0]


@pytest.mark.parametrize(("size", "layout"), SETTINGS)
@pytest.mark.parametrize(
    ("damage", "least"),
    [
        (add_noise(0.05), 0.98),
        (add_noise(0.10), 0.97),
        (blur, 0.98),
        (lambda image, index: as_image(image * 1.15), 0.98),
        (lambda image, index: as_image(image * 0.85), 0.98),
        (lambda image, index: as_image(image + 38.0), 0.98),
        (lambda image, index: as_image(image - 38.0), 0.98),
    ],
    ids=["noise .05", "noise .10", "blur", "gain up", "gain down", "brighter", "darker"],
)
def test_damage_that_leaves_shapes_readable(
    size: int, layout: str, damage: Callable, least: float
) -> None:
    result = scores(size, layout, damage, MAIN_TAGS)
    assert result[:, 1].mean() >= least
    assert result[:, 2].mean() <= 0.02


def test_heavy_noise_costs_at_32_pixels_and_not_at_64() -> None:
    assert 0.6 <= scores(32, "free", add_noise(0.20), MAIN_TAGS)[:, 1].mean() <= 0.92
    assert scores(64, "free", add_noise(0.20), MAIN_TAGS)[:, 1].mean() >= 0.95


def low_frequency(image: Image, index: int) -> Image:
    grid = np.random.default_rng(index).uniform(0, 255, (6, 6, 3))
    return as_image(ndimage.zoom(grid, (len(image) / 6, len(image) / 6, 1), order=1))


@pytest.mark.parametrize(("size", "layout"), SETTINGS)
@pytest.mark.parametrize(
    "nothing",
    [
        lambda image, index: np.full_like(image, 128),
        lambda image, index: np.full_like(image, 255),
        lambda image, index: (
            np.random.default_rng(index).integers(0, 256, image.shape).astype(np.uint8)
        ),
        low_frequency,
    ],
    ids=["grey", "white", "uniform noise", "low-frequency noise"],
)
def test_images_of_nothing_score_nothing_under_the_strict_rule(
    size: int, layout: str, nothing: Callable
) -> None:
    result = scores(size, layout, nothing)
    assert result[:, 1].max() == 0
    assert result[:, 0].mean() <= 0.25


def shuffle_patches(image: Image, index: int) -> Image:
    side = len(image) // 4
    patches = [
        image[r : r + side, c : c + side]
        for r in range(0, len(image), side)
        for c in range(0, len(image), side)
    ]
    order = np.random.default_rng(index).permutation(16)
    return np.concatenate(
        [
            np.concatenate([patches[order[4 * row + column]] for column in range(4)], axis=1)
            for row in range(4)
        ]
    )


@pytest.mark.parametrize("size", [32, 64])
def test_shuffled_patches_and_blends_hardly_score(size: int) -> None:
    assert scores(size, "free", shuffle_patches)[:, 1].mean() <= 0.05

    def blend(share: float) -> Callable[[Image, int], Image]:
        others = [scene.render() for scene in scenes(size, "free")]
        return lambda image, index: as_image(
            share * image + (1 - share) * others[(index + 1) % len(others)]
        )

    for share in (0.5, 0.65):
        assert scores(size, "free", blend(share))[:, 1].mean() <= 0.05


def test_everything_everywhere_passes_the_lax_rule_only() -> None:
    """Eight different objects in every image: GenEval's rule does not punish what was not asked
    for.
    """
    vocabulary = vocabulary_for(64)
    crowded = [
        generate_scene(Random(i), "list8", 64, "free", vocabulary, "any").render() for i in range(8)
    ]
    items = [scene.geneval("") for scene in scenes(64, "free") if scene.tag in MAIN_TAGS]
    result = [score_image(crowded[index % 8], item) for index, item in enumerate(items)]
    assert np.mean([score.lax for score in result]) > 0.25
    assert np.mean([score.strict for score in result]) == 0


@pytest.mark.parametrize("layout", ["simple", "free"])
def test_flip_exchanges_left_and_right(layout: str) -> None:
    opposite = {"left of": "right of", "right of": "left of"}
    for scene in scenes(32, layout):
        if scene.relation is None:
            continue
        item = scene.geneval("")
        flipped = np.ascontiguousarray(scene.render()[:, ::-1])
        assert score_image(flipped, item | {"layout": layout}).strict == (
            scene.relation not in opposite
        )
        item["include"][1]["position"][0] = opposite.get(scene.relation, scene.relation)
        assert score_image(flipped, item | {"layout": layout}).strict


def test_scoring_is_deterministic() -> None:
    for scene in scenes(32, "free")[::5]:
        image = add_noise(0.15)(scene.render(), 3)
        assert score_image(image, scene.geneval("")) == score_image(image.copy(), scene.geneval(""))


def test_noise_level_is_the_standard_deviation() -> None:
    scene = scenes(64, "free")[0].render() / 255
    for deviation in (0.0, 0.05, 0.1, 0.2):
        noisy = scene + np.random.default_rng(0).normal(0, deviation, scene.shape)
        assert noise_level(noisy) == pytest.approx(deviation, rel=0.12)


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((0, 0, 10, 10), (30, 0, 40, 10), {"left of"}),
        ((30, 0, 40, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 30, 10, 40), {"above"}),
        ((0, 30, 10, 40), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (30, 30, 40, 40), {"left of", "above"}),
        ((0, 0, 10, 10), (1, 1, 11, 11), set()),  # 1 px apart, below a tenth of the extents
        # 5 - 0.1 x 20 = 3, over a distance of 5: 0.6
        ((0, 0, 10, 10), (5, 0, 15, 10), {"left of"}),
        # 4 - 2 = 2, over 4: exactly 0.5, which is not more
        ((0, 0, 10, 10), (4, 0, 14, 10), set()),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ],
)
def test_relations_follow_genevals_formula(box: tuple, other: tuple, expected: set) -> None:
    assert relative_position(box, other) == expected


def test_relations_match_an_independent_reading_of_the_formula() -> None:
    """Offset of centres, less a tenth of the summed extents per axis, over the distance; beyond
    +-0.5.
    """
    rng = np.random.default_rng(0)
    for _ in range(2000):
        left, top, width, height = rng.uniform(0, 64, (4, 2))
        dx, dy = (
            ((left + width / 2)[0] - (left + width / 2)[1]),
            ((top + height / 2)[0] - (top + height / 2)[1]),
        )
        fx = np.sign(dx) * max(0.0, abs(dx) - 0.1 * width.sum()) / np.hypot(dx, dy)
        fy = np.sign(dy) * max(0.0, abs(dy) - 0.1 * height.sum()) / np.hypot(dx, dy)
        expected = {
            n
            for n, yes in zip(
                ("left of", "right of", "above", "below"),
                (fx < -0.5, fx > 0.5, fy < -0.5, fy > 0.5),
            )
            if yes
        }
        boxes = np.stack([left, top, left + width, top + height], axis=1)
        assert relative_position(boxes[0], boxes[1]) == expected


def found(
    shape: str,
    colour: str,
    iou: float = 0.9,
    box: tuple[int, int, int, int] = (0, 0, 10, 10),
    size: str = "small",
) -> Found:
    return Found(shape, colour, iou, 0, 0, 100.0, box, size)


@pytest.mark.parametrize(
    ("objects", "include", "exclude", "lax", "reason"),
    [
        ([found("circle", "red")], [{"class": "circle", "count": 1, "color": "red"}], [], True, ""),
        # the colour must hold on the best detection, not on any
        (
            [found("circle", "blue", 0.95), found("circle", "red", 0.9)],
            [{"class": "circle", "count": 1, "color": "red"}],
            [],
            False,
            "expected red circle>=1, found blue; expected 1 objects in all, found 2",
        ),
        (
            [found("circle", "red")],
            [{"class": "square", "count": 1}],
            [],
            False,
            "expected square>=1, found 0",
        ),
        (
            [found("circle", "red"), found("circle", "red"), found("circle", "red")],
            [{"class": "circle", "count": 2}],
            [{"class": "circle", "count": 3}],
            False,
            "expected circle<3, found 3; expected 2 objects in all, found 3",
        ),
        # the target of a relation must itself be right
        (
            [found("circle", "red"), found("square", "red", box=(30, 0, 40, 10))],
            [
                {"class": "circle", "count": 1, "color": "blue"},
                {"class": "square", "count": 1, "position": ["right of", 0]},
            ],
            [],
            False,
            "expected blue circle>=1, found red; no target for square to be right of",
        ),
        # a class named twice: each clause looks for its own colour
        (
            [found("circle", "blue", 0.95), found("circle", "red", 0.9)],
            [
                {"class": "circle", "count": 1, "color": "red"},
                {"class": "circle", "count": 1, "color": "blue"},
            ],
            [],
            True,
            "",
        ),
        (
            [found("ring", "red", size="large")],
            [{"class": "ring", "count": 1, "size": "small"}],
            [],
            False,
            "expected small ring>=1, found large",
        ),
    ],
)
def test_lax_rule(objects: list, include: list, exclude: list, lax: bool, reason: str) -> None:
    score = judge(
        Analysis(tuple(objects), 0.0), {"tag": "x", "include": include, "exclude": exclude}
    )
    assert (score.lax, score.reason) == (lax, reason)


def test_clutter_is_judged_by_the_strict_rule_only() -> None:
    item = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    for clutter, strict in ((24.0, True), (26.0, False)):
        score = judge(Analysis((found("circle", "red"),), clutter), item)
        assert (score.lax, score.strict) == (True, strict)


def test_what_cannot_be_scored_is_refused() -> None:
    item = {"tag": "colors", "include": [{"class": "circle", "count": 1}]}
    for image in (
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 3)),
        np.zeros((32, 48, 3), np.uint8),
    ):
        with pytest.raises(InputError, match="square uint8 RGB"):
            score_image(image, item)
    with pytest.raises(InputError, match="not in GenEval's schema"):
        score_image(np.zeros((32, 32, 3), np.uint8), {"tag": "colors"})


def test_evaluation_sums_up_as_geneval_does(tmp_path: Path) -> None:
    items = benchmark_prompts(32, "free", seed=0, per_tag=4, tags=("colors", "position"))
    vocabulary, images = vocabulary_for(32), []
    for number, item in enumerate(items):
        rng = Random(number)
        while True:
            scene = generate_scene(rng, item["tag"], 32, "free", vocabulary, "any")
            if scene.geneval("")["include"] == item["include"]:
                break
        right, blank = scene.render(), np.full((32, 32, 3), 128, np.uint8)
        # colours: every image right; positions: one image of two, and none for the last prompt
        images.append(
            [right, right] if item["tag"] == "colors" else [blank, blank if number == 7 else right]
        )
    result = evaluate_images(items, images)
    by_tag = {tag.tag: tag for tag in result.tags}
    assert (by_tag["colors"].lax.value, by_tag["position"].lax.value) == (1.0, 0.375)
    assert by_tag["position"].lax.low < 0.375 < by_tag["position"].lax.high
    assert (result.overall_lax.value, result.overall_strict.value) == (0.6875, 0.6875)
    assert (result.correct_images, result.correct_prompts) == (11 / 16, 7 / 8)
    # of every held-out group one prompt per category: too few for an interval
    assert result.by_held_out == {}
    assert 0 < by_tag["colors"].floor_lax < 0.5
    assert result.metrics()["position/lax"] == 0.375
    assert "| colors | 4 | 8 | 1.000 [1.000, 1.000]" in result.table()
    write_results(tmp_path / "results.jsonl", result)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert list(lines[0]) == [
        "filename",
        "tag",
        "prompt",
        "correct",
        "reason",
        "metadata",
        "details",
        "strict",
    ]
    assert lines[3]["filename"] == "00001/samples/0001.png"
    assert json.loads(lines[0]["metadata"])["include"] == items[0]["include"]
    assert sum(line["correct"] for line in lines) == 11
    (detections,) = json.loads(lines[0]["details"]).values()
    assert [len(detection) for detection in detections] == [5]
    write_results(tmp_path / "results.jsonl", result, "images/key")
    first = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert first["filename"] == "images/key/00000/samples/0000.png"


def test_every_prompt_needs_its_images() -> None:
    items = benchmark_prompts(32, "free", seed=0, per_tag=2, tags=("colors",))
    blank = np.full((32, 32, 3), 128, np.uint8)
    floor = {"colors": (0.0, 0.0)}
    for images, message in (
        ([[], []], "prompt 0 .*no images"),
        ([[blank]], "2 prompts and 1 groups"),
        ([[blank]] * 3, "2 prompts and 3 or more groups"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_images(items, images, floor)


def test_images_are_let_go_as_they_are_scored() -> None:
    items = benchmark_prompts(32, "free", seed=0, per_tag=8, tags=("colors",))
    alive: list[weakref.ref] = []
    most = 0

    def image() -> Image:
        nonlocal most
        made = np.full((32, 32, 3), 128, np.uint8)
        alive.append(weakref.ref(made))
        most = max(most, sum(one() is not None for one in alive))
        return made

    result = evaluate_images(
        items, ((image() for _ in range(4)) for _ in items), {"colors": (0.0, 0.0)}
    )
    assert len(result.images) == 32
    assert most <= 2  # the one being scored and the one being made


def test_chance_floor_is_low_and_measured_at_the_same_threshold() -> None:
    items = benchmark_prompts(32, "free", seed=0, per_tag=8, tags=MAIN_TAGS)
    floor = chance_floor(items, 32)
    assert set(floor) == set(MAIN_TAGS)
    assert 0.1 < floor["single_object"][0] < 0.45  # four shapes
    assert floor["color_attr"][0] < 0.06
    assert 0.02 < np.mean([lax for lax, _ in floor.values()]) < 0.2
