"""Rows advanced together: what they share is computed once, and each keeps its own way."""

from __future__ import annotations

import pytest
import torch

from lidit.config import ObjectiveSettings, SamplerSettings
from lidit.diffusion import build_objective
from lidit.diffusion.stepper import Caption, Padding, Row, Stepper
from lidit.errors import InputError
from lidit.models import TextStates
from tests.helpers.random_pipeline import random_pipeline, random_states

SHAPE = (3, 16, 16)


def stepper(padding: Padding | None = None, guidance_input: bool = False) -> Stepper:
    pipeline = random_pipeline("clean", guidance_input=guidance_input)
    empty = {name: entry.collate([entry.empty]) for name, entry in pipeline.encoders.items()}
    return Stepper(pipeline.model, pipeline.objective, empty, padding)


def row(owner: Stepper, key: int, seed: int = 0, **sampler: object) -> Row:
    settings = SamplerSettings.model_validate({"steps": 4, "guidance_scale": 2.0, **sampler})
    return owner.row(Caption(str(key), random_states(3 + key, key)), settings, seed, SHAPE)


class Passes:
    """Captions that a refiner reads and rows that the transformer gets, pass by pass."""

    def __init__(self, owner: Stepper) -> None:
        self.captions: list[int] = []
        self.rows: list[int] = []
        self.tokens: list[int] = []
        owner.model.conditioner.register_forward_pre_hook(
            lambda _, inputs: self.captions.append(len(inputs[1]))
        )
        owner.model.transformer.register_forward_pre_hook(self._seen)

    def _seen(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.rows.append(len(inputs[0]))
        self.tokens.append(inputs[2].tokens.shape[1])


def test_a_caption_shared_at_one_t_is_refined_once_and_unguided_rows_have_no_second_half() -> None:
    owner = stepper()
    rows = [
        row(owner, 1),
        row(owner, 1, seed=1),
        row(owner, 2, guidance_scale=1.0),
        row(owner, 1, steps=2),
    ]
    passes = Passes(owner)
    owner.advance(rows)
    assert (passes.captions, passes.rows) == ([2], [7])  # t = 1 for all of them
    owner.advance(rows)
    # the row of two steps has another t now
    assert (passes.captions[1:], passes.rows[1:]) == ([3], [7])
    assert [entry.walk.number for entry in rows] == [2, 2, 2, 2]
    assert [entry.walk.finished for entry in rows] == [False, False, False, True]


def test_outside_its_interval_a_row_has_no_second_half() -> None:
    owner = stepper()
    passes = Passes(owner)
    entry = row(owner, 1, guidance_interval=(0.4, 0.6))  # t is 1, 0.75, 0.5, 0.25
    for _ in range(4):
        owner.advance([entry])
    assert passes.rows == [1, 1, 2, 1]


def test_a_row_of_a_model_that_takes_the_scale_has_no_second_half_and_is_the_pipelines_own() -> (
    None
):
    owner, pipeline = stepper(guidance_input=True), random_pipeline("clean", guidance_input=True)
    passes = Passes(owner)
    rows = [
        row(owner, 1, guidance_scale=scale, guidance_interval=(0.4, 1.0))
        for scale in (1.0, 2.0, 5.0)
    ]
    for _ in range(4):
        owner.advance(rows)
    assert passes.rows == [3] * 4
    for entry, scale in zip(rows, (1.0, 2.0, 5.0), strict=True):
        states = {
            name: pipeline.encoders[name].collate([one])
            for name, one in random_states(4, 1).items()
        }
        alone = pipeline(
            states=states,
            seed=0,
            guidance_scale=scale,
            guidance_interval=(0.4, 1.0),
            output_type="latent",
        )
        torch.testing.assert_close(entry.walk.latents, alone.images, rtol=0, atol=1e-3)
    assert not torch.allclose(rows[1].walk.latents, rows[2].walk.latents, atol=1e-2)
    away = Caption("away", random_states(2, 9))
    with pytest.raises(
        InputError, match="leave it out, or draw with the model that it was distilled from"
    ):
        owner.row(away, SamplerSettings(steps=4, guidance_scale=2.0), 0, SHAPE, negative=away)
    with pytest.raises(InputError, match="takes the guidance scale as an input"):
        pipeline(states=states, negative_prompt_embeds=states, seed=0)


def test_the_empty_caption_is_refined_once_per_schedule() -> None:
    owner = stepper()
    passes = Passes(owner)
    for seed in range(3):
        row(owner, 1, seed)
    assert passes.captions == [4]  # all steps of the schedule at once
    row(owner, 1, steps=7)
    row(owner, 1, steps=7, guidance_scale=5.0)
    assert passes.captions == [4, 7]
    row(owner, 1, steps=9, guidance_scale=1.0)
    assert passes.captions == [4, 7]


def test_a_long_schedule_is_refined_in_parts_and_old_schedules_are_forgotten() -> None:
    owner = stepper()
    passes = Passes(owner)
    row(owner, 1, steps=130)
    assert passes.captions == [64, 64, 2]
    for steps in range(1000, 1005):
        row(owner, 1, steps=steps)
    before = len(passes.captions)
    row(owner, 1, steps=1004)
    assert len(passes.captions) == before
    row(owner, 1, steps=130)
    assert passes.captions[before:] == [64, 64, 2]


def test_padding_fixes_the_shapes_of_passes() -> None:
    owner = stepper(Padding(rows=4, tokens=8))
    passes = Passes(owner)
    rows = [row(owner, 1), row(owner, 2), row(owner, 3, guidance_scale=1.0)]
    for count in (1, 2, 3):
        owner.advance(rows[:count])
    assert passes.captions[1:] == [4, 4, 4]
    assert passes.rows == [4, 4, 8]
    assert passes.tokens == [16, 16, 16]  # two encoders


@pytest.mark.parametrize("kind", ["ddpm", "rectified_flow", "clean"])
def test_a_preview_is_the_data_that_the_prediction_points_to(kind: str) -> None:
    """An exact prediction points to the data from every noise level."""
    objective = build_objective(ObjectiveSettings.model_validate({"kind": kind}))
    data, noise, t = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE), torch.tensor([0.3, 0.5])
    x_t = objective.add_noise(data, noise, t)
    exact = {"ddpm": noise, "rectified_flow": noise - data, "clean": data}[kind]
    torch.testing.assert_close(objective.estimate(exact, x_t, t), data, rtol=1e-4, atol=1e-4)


def test_previews_come_for_the_rows_that_want_them() -> None:
    owner = stepper()
    rows = [row(owner, 1), row(owner, 2, guidance_scale=1.0)]
    before = rows[1].walk.latents
    (estimate,) = owner.advance(rows, {rows[1]})
    text = {
        name: TextStates.collate([entry], owner.empty[name].prefix)
        for name, entry in random_states(5, 2).items()
    }
    with torch.no_grad():
        # of this objective the prediction is the data
        predicted = owner.model(before, torch.ones(1), text)
    torch.testing.assert_close(estimate, predicted[0], rtol=1e-3, atol=1e-4)
