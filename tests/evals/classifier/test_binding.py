"""The diffusion classifier, with networks whose knowledge is known exactly, and the intervals
behind it.
"""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from lidit.datasets.scenes.scene import names_colours
from lidit.datasets.scenes.shapes import COLOURS, vocabulary_for
from lidit.errors import InputError
from lidit.evals.classifier.binding import (
    Case,
    Measure,
    generate_cases,
    loss_by_timestep,
    measure_binding,
    pixels,
)
from lidit.evals.statistics import (
    bootstrap_columns,
    bootstrap_mean,
    bootstrap_overall,
    mean_over_seeds,
)


class Drawer:
    """Predicts the clean image as the caption's own scene; segments in `ignored` it draws grey,
    whatever is said.
    """

    def __init__(self, cases: list[Case], ignored: tuple[int, ...] = ()) -> None:
        self.cases = {image.numpy().tobytes(): case for image, case in zip(pixels(cases), cases)}
        self.ignored = ignored
        self.seen: list[tuple[list[str], Tensor, Tensor]] = []

    def __call__(
        self, images: Tensor, captions: list[str], timestep: Tensor, noise: Tensor
    ) -> Tensor:
        self.seen.append((captions, timestep, noise))
        return torch.stack(
            [self.error(image, text, eps) for image, text, eps in zip(images, captions, noise)]
        )

    def error(self, image: Tensor, text: str, noise: Tensor) -> Tensor:
        colours = re.findall("|".join(COLOURS), text)
        loss = noise.square().mean()
        for position, (item, colour) in enumerate(
            zip(self.cases[image.numpy().tobytes()].scene.objects, colours)
        ):
            if position not in self.ignored:
                drawn = torch.tensor(COLOURS[colour]) / 127.5 - 1
                loss = loss + (image[:, int(item.y), int(item.x)] - drawn).square().sum()
        return loss


@pytest.mark.parametrize("kind", ["binding", "attribute"])
def test_a_network_that_reads_is_always_right(kind: str) -> None:
    cases = generate_cases(Measure(kind, "list4"), 24, 32, "free")
    result = measure_binding(Drawer(cases), cases)
    assert (result.accuracy.value, result.accuracy.low) == (1.0, 1.0)
    assert result.gap.low > 0
    assert set(result.by_position) == {0, 1, 2, 3}
    assert result.by_timestep == {0.95: 1.0, 0.85: 1.0, 0.7: 1.0, 0.5: 1.0}
    assert result.metrics()["accuracy_position_4"] == 1.0


def test_a_network_that_reads_the_words_the_wrong_way_round_is_always_wrong() -> None:
    cases = generate_cases(Measure("binding", "color_attr"), 12, 32, "simple")
    reader = Drawer(cases)
    result = measure_binding(lambda *inputs: -reader(*inputs), cases)
    assert result.accuracy.value == 0


def test_a_network_that_does_not_read_has_no_gap_at_all() -> None:
    cases = generate_cases(Measure("binding", "list4"), 16, 32, "free")
    result = measure_binding(Drawer(cases, ignored=(0, 1, 2, 3)), cases)
    assert not result.gaps.any()
    assert (result.accuracy.value, result.accuracy.low, result.accuracy.high) == (0.5, 0.5, 0.5)


def test_positions_are_told_apart() -> None:
    cases = generate_cases(Measure("attribute", "list4"), 32, 32, "free")
    result = measure_binding(Drawer(cases, ignored=(2, 3)), cases)
    assert [result.by_position[position].value for position in range(4)] == [1.0, 1.0, 0.5, 0.5]


def test_both_captions_meet_the_same_noise_whatever_the_batch() -> None:
    cases = generate_cases(Measure("binding", "color_attr"), 10, 32, "simple")
    network = Drawer(cases)
    whole = measure_binding(network, cases, batch_size=10, timesteps=(0.9, 0.4))
    calls = network.seen
    assert [call[1].unique().tolist() for call in calls] == [
        [pytest.approx(t)] for t in (0.9, 0.4, 0.9, 0.4)
    ]
    assert torch.equal(calls[0][2], calls[2][2])
    assert not torch.equal(calls[0][2], calls[1][2])
    assert calls[0][0] == [case.caption for case in cases]
    assert calls[2][0] == [case.wrong for case in cases]
    assert np.array_equal(
        measure_binding(network, cases, batch_size=3, timesteps=(0.9, 0.4)).gaps, whole.gaps
    )


@pytest.mark.parametrize(
    "style", ["bare", "clauses", "ordinals", "sentences", "long", "long_before"]
)
def test_wrong_captions_keep_the_words_and_move_the_colours(style: str) -> None:
    for case in generate_cases(Measure("binding", "list4", style), 20, 32, "free"):
        true, wrong = case.caption.split(), case.wrong.split()
        assert sorted(re.findall(r"\w+", case.caption.replace("an ", "a "))) == sorted(
            re.findall(r"\w+", case.wrong.replace("an ", "a "))
        )
        changed = [
            index
            for index, (a, b) in enumerate(zip(true, wrong))
            if a != b and a not in ("a", "an")
        ]
        assert len(changed) == 2
        colours = {
            item.colour for index, item in enumerate(case.scene.objects) if index in case.positions
        }
        assert {re.sub(r"\W", "", true[index]) for index in changed} == colours


def test_wrong_captions_of_other_kinds() -> None:
    for case in generate_cases(Measure("relation", "position"), 8, 32, "simple"):
        assert {case.caption.split()[2], case.wrong.split()[2]} in (
            {"left", "right"},
            {"above", "below"},
        )
    for case in generate_cases(Measure("binding", "size_attr"), 8, 32, "free"):
        assert (
            case.caption.replace("small", "?").replace("large", "small").replace("?", "large")
            == case.wrong
        )
    for index, case in enumerate(generate_cases(Measure("attribute", "list4"), 8, 32, "free")):
        assert case.positions == (index % 4,)


@pytest.mark.parametrize("kind", ["binding", "attribute"])
def test_wrong_captions_describe_another_scene_even_where_shapes_repeat(kind: str) -> None:
    for case in generate_cases(Measure(kind, "list8"), 30, 32, "free"):
        assert set(case.caption.replace(" and ", ", ").split(", ")) != set(
            case.wrong.replace(" and ", ", ").split(", ")
        )
        assert len(case.positions) == (2 if kind == "binding" else 1)


def test_neither_caption_names_a_held_out_pair() -> None:
    held_out = vocabulary_for(32).held_out_pairs()
    named = [f"{colour} {shape}" for colour, shape in held_out]
    for kind in ("binding", "attribute"):
        for case in generate_cases(Measure(kind, "color_attr"), 60, 32, "simple"):
            assert not any(pair in text for pair in named for text in (case.caption, case.wrong))
    unseen = generate_cases(Measure("binding", "color_attr", split="unseen"), 20, 32, "simple")
    assert all(any(pair in case.caption for pair in named) for case in unseen)


@pytest.mark.parametrize(
    ("kind", "tag", "style", "message"),
    [
        ("binding", "colors", "bare", "cannot be made in colors"),
        ("relation", "color_attr", "bare", "cannot be made in color_attr"),
        ("binding", "two_object", "bare", "cannot be made in two_object"),
        ("negation", "colors", "bare", "choose from binding, attribute, relation"),
        ("relation", "position", "clauses", "cannot describe a position scene"),
    ],
)
def test_what_does_not_go_together_is_refused(
    kind: str, tag: str, style: str, message: str
) -> None:
    assert names_colours("colors")
    with pytest.raises(InputError, match=message):
        generate_cases(Measure(kind, tag, style), 4, 32, "free")


def test_a_loss_of_the_wrong_shape_or_not_finite_is_refused() -> None:
    cases = generate_cases(Measure("binding", "color_attr"), 4, 32, "simple")
    for loss in (
        lambda x, c, t, n: x.mean(),
        lambda x, c, t, n: x.flatten(1).sum(1) * float("nan"),
    ):
        with pytest.raises(InputError, match="expected 4 finite values"):
            measure_binding(loss, cases)
    with pytest.raises(InputError, match="one image is needed per case"):
        measure_binding(
            lambda x, c, t, n: x.flatten(1).sum(1), cases, images=torch.zeros(3, 3, 32, 32)
        )


def test_validation_loss_by_timestep() -> None:
    cases = generate_cases(Measure("attribute", "colors"), 20, 32, "simple")
    images = pixels(cases)
    assert images.shape == (20, 3, 32, 32)
    assert -1 <= images.min() < images.max() <= 1
    result = loss_by_timestep(
        lambda x, c, t, n: t * n.flatten(1).square().mean(1),
        images,
        [case.caption for case in cases],
        (1.0, 0.5),
    )
    assert result[1.0].value == pytest.approx(1, abs=0.02)
    assert result[0.5].low < 0.5 < result[0.5].high
    beside = measure_binding(
        lambda x, c, t, n: t * n.flatten(1).square().mean(1), cases, timesteps=(1.0, 0.5)
    )
    assert beside.true_loss == result


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        interval = bootstrap_mean(rng.normal(3, 1, 40), seed=seed)
        hits += interval.low <= 3 <= interval.high
    assert 0.88 <= hits / 100 <= 0.99


def test_correlated_values_widen_the_interval_by_their_clusters() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=25), 16)
    alone, grouped = bootstrap_mean(values), bootstrap_mean(values, np.repeat(np.arange(25), 16))
    assert alone.value == pytest.approx(grouped.value)
    assert 3 < (grouped.high - grouped.low) / (alone.high - alone.low) < 5.5


def test_cases_of_one_caption_do_not_narrow_the_interval() -> None:
    cases = generate_cases(Measure("attribute", "colors"), 16, 32, "simple")
    repeated = [case for case in cases for _ in range(8)]

    def loss(
        images: torch.Tensor, captions: list[str], t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Right and wrong by the caption alone, so a caption's copies agree."""
        return torch.tensor([float(len(caption) % 3) for caption in captions])

    once, eightfold = (
        measure_binding(loss, group, timesteps=(0.5,)) for group in (cases, repeated)
    )
    assert once.accuracy.low < once.accuracy.value < once.accuracy.high
    assert eightfold.accuracy == once.accuracy
    assert eightfold.gap == once.gap


def test_absent_values_and_seeds() -> None:
    first, second = bootstrap_columns([[1.0, np.nan], [0.0, 1.0], [0.5, np.nan]])
    assert (first.value, second.value) == (0.5, 1.0)
    single = mean_over_seeds([0.4])
    assert (single.low, single.high) == (-np.inf, np.inf)
    three = mean_over_seeds([0.4, 0.5, 0.6])
    assert (three.value, three.low, three.high) == pytest.approx((0.5, 0.2516, 0.7484), abs=1e-4)
    within = mean_over_seeds([0.9, 1.0, 1.0], 0, 1)
    assert (within.low, within.high) == pytest.approx((0.8232, 1.0), abs=1e-4)
    with pytest.raises(InputError, match="no interval"):
        bootstrap_mean([])


def test_overall_is_the_mean_of_the_categories_with_prompts_resampled_in_each() -> None:
    values, groups = [1, 1, 1, 1, 0, 1, 0, 1], ["a"] * 4 + ["b"] * 4
    apart = bootstrap_overall(values, groups, range(8))
    assert apart.value == 0.75
    assert (apart.low, apart.high) == (0.5, 1.0)  # "a" has no spread, "b" is between 0 and 1
    together = bootstrap_overall(values, groups, [0, 0, 1, 1, 2, 3, 2, 3])
    assert (together.value, together.low, together.high) == (0.75, 0.5, 1.0)
    weighted = bootstrap_overall([1, 0, 0, 0], ["a", "b", "b", "b"], range(4))
    assert (weighted.value, weighted.low, weighted.high) == (0.5, 0.5, 0.5)
