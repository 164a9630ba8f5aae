"""A negative caption in the place of the empty one: what guidance leads away from."""

from __future__ import annotations

import torch

from lidit.config import SamplerChanges
from lidit.diffusion import GuidedPredictor, initial_noise, sample, seeded_generators
from lidit.pipeline import LIDiTPipeline
from lidit.serving import Engine, Request
from tests.helpers.random_pipeline import random_pipeline, random_states

SAMPLER = SamplerChanges(steps=5, guidance_scale=3.0)
STATES, NEGATIVE = random_states(5, 1), random_states(3, 2)


def expected(pipeline: LIDiTPipeline, negative: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
    """The latents of plain sampling, with the negative prompt's states as the empty caption's."""
    text, away = (
        {name: entry.collate([states[name]]) for name, entry in pipeline.encoders.items()}
        for states in (STATES, negative)
    )
    sampler = SAMPLER.applied(pipeline.sampler)
    generators = seeded_generators([seed])
    noise = initial_noise(generators, pipeline.latent_shape(), torch.device("cpu"))
    with torch.no_grad():
        predict = GuidedPredictor(pipeline.model, text, away, sampler)
        return sample(predict, pipeline.objective, noise, sampler, generators)


def test_guidance_leads_away_from_the_negative_prompt_beside_others_without_one() -> None:
    pipeline = random_pipeline("clean")
    requests = [
        Request(STATES, [0], SAMPLER, negative=NEGATIVE),
        Request(STATES, [1], SAMPLER),
        Request(STATES, [2], SAMPLER, negative=STATES),
    ]
    with Engine(pipeline, cap_of=lambda size: 8) as engine:
        first, plain, same = (engine.submit(request) for request in requests)
    torch.testing.assert_close(first.result(), expected(pipeline, NEGATIVE, 0), rtol=0, atol=1e-3)
    empty = {name: entry.empty for name, entry in pipeline.encoders.items()}
    torch.testing.assert_close(plain.result(), expected(pipeline, empty, 1), rtol=0, atol=1e-3)
    torch.testing.assert_close(same.result(), expected(pipeline, STATES, 2), rtol=0, atol=1e-3)
    assert (first.result() - expected(pipeline, empty, 0)).abs().max() > 0.01
