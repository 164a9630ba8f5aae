"""The race of samplers: costs, who leaves, the Pareto front."""

from __future__ import annotations

from random import Random

import pytest

from lidit.config import ObjectiveSettings, SamplerSettings
from lidit.config.tune import TuneSettings
from lidit.diffusion import build_objective
from lidit.errors import InputError
from lidit.evals.tuning import (
    Candidate,
    candidates,
    drop_beaten,
    evaluations_of,
    front,
    gain,
    pareto_table,
    recommended,
)

CLEAN = build_objective(ObjectiveSettings(kind="clean"))
TAGS = [("one", "two")[place % 2] for place in range(200)]


def racer(evaluations: int, rate: float, seed: int = 0, count: int = 200) -> Candidate:
    """Scores of which a share `rate` is 1, the same pictures right for a higher rate as for a lower
    one.
    """
    random = Random(seed)
    draws = [random.random() for _ in range(count)]
    sampler = SamplerSettings(steps=evaluations, guidance_scale=1.0)
    return Candidate(sampler, evaluations, [float(draw < rate) for draw in draws])


def test_a_guided_step_costs_two_evaluations_unless_the_scale_is_an_input() -> None:
    sampler = SamplerSettings(steps=4, guidance_scale=2.0)  # t is 1, 0.75, 0.5, 0.25
    assert evaluations_of(CLEAN, sampler) == 8
    assert evaluations_of(CLEAN, sampler, takes_guidance=True) == 4
    assert evaluations_of(CLEAN, sampler.model_copy(update={"guidance_interval": (0.4, 0.8)})) == 6
    assert evaluations_of(CLEAN, sampler.model_copy(update={"guidance_scale": 1.0})) == 4


def test_no_two_candidates_draw_the_same() -> None:
    settings = TuneSettings(
        steps=(2, 4), schedulers=("auto", "euler", "ddim"), guidance_scales=(1.0, 2.0),
        guidance_intervals=((0.0, 1.0), (0.1, 1.0), (0.6, 1.0)),
    )  # fmt: skip
    found = candidates(settings, CLEAN)
    # Of 2 steps (t = 1, 0.5): plain, guided, guided at first; of 4: the same three.
    assert [(c.sampler.steps, c.sampler.guidance_scale, c.evaluations) for c in found] == [
        (2, 1.0, 2), (2, 2.0, 3), (2, 2.0, 4), (4, 1.0, 4), (4, 2.0, 6), (4, 2.0, 8),
    ]  # fmt: skip
    with pytest.raises(
        InputError, match="none of these can sample the objective; it has euler, dpm_solver"
    ):
        candidates(TuneSettings(schedulers=("ddim",)), CLEAN)


def test_whoever_is_surely_beaten_for_no_more_evaluations_leaves() -> None:
    cheap, dear, dearest, near = racer(4, 0.8), racer(8, 0.5), racer(16, 0.9), racer(16, 0.79)
    drop_beaten([cheap, dear, dearest, near], TAGS)
    assert [c.running for c in (cheap, dear, dearest, near)] == [True, False, True, False]
    early = [racer(4, 0.9, count=6), racer(8, 0.0, count=6)]
    drop_beaten(early, TAGS[:6])
    assert all(c.running for c in early)
    even = [racer(4, 0.8), racer(8, 0.8)]
    drop_beaten(even, TAGS)
    assert all(c.running for c in even)  # nothing tells them apart
    assert gain(dearest, cheap, TAGS).low > 0
    assert gain(dearest, cheap, TAGS).value == pytest.approx(-gain(cheap, dearest, TAGS).value)


def test_few_pictures_recommend_no_cheap_sampler() -> None:
    few = [racer(4, 0.8, count=24), racer(16, 0.9, count=24)]
    assert gain(few[1], few[0], TAGS).low <= 0  # nothing tells them apart
    assert recommended(few, TAGS, margin=0.03) is few[1]
    many = [racer(4, 0.89), racer(16, 0.9)]
    assert recommended(many, TAGS, margin=0.03) is many[0]
    assert recommended(many, TAGS, margin=0.0) is many[1]


def test_the_front_rises_and_the_recommended_is_the_cheapest_of_the_best() -> None:
    finalists = [racer(4, 0.5), racer(8, 0.9), racer(8, 0.85), racer(16, 0.905), racer(32, 0.7)]
    best = front(finalists, TAGS)
    assert [c.evaluations for c in best] == [4, 8, 16]
    assert best[1] is finalists[1]
    chosen = recommended(finalists, TAGS, margin=0.03)
    assert chosen is finalists[1]  # 0.905 is surely less than .03 above 0.9
    table = pareto_table(best, chosen, TAGS)
    assert table.count("\n") == 4
    assert f"| 8 | **{chosen.label}** |" in table
