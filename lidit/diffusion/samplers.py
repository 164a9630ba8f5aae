"""From noise to latents with diffusers' schedulers.

Shapes: B batch, C latent channels, H x W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lidit.config import SamplerSettings
from lidit.diffusion.objectives import Objective

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample, so that neither batch nor device decides what a sample looks like."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def initial_noise(
    generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal noise [B, *shape], sample i from generator i."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


@torch.no_grad()
def sample(
    predict: Predict,
    objective: Objective,
    noise: torch.Tensor,
    sampler: SamplerSettings,
    generators: Sequence[torch.Generator] | None = None,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Walk from `noise` [B, C, H, W] to latents x0 [B, C, H, W], float32.

    Args:
        predict: (x_t, t [B] in [0, 1]) -> the network's prediction, guidance included (see `GuidedPredictor`).
        generators: one per sample, for the schedulers that add noise on the way ("ddpm"); required there.
        on_step: called after every step with its number and the latents.
    Raises:
        InputError: the sampler's scheduler cannot run this objective.
        ValueError: "ddpm" without generators.
    """
    scheduler = objective.scheduler(sampler)
    stochastic = objective.scheduler_name(sampler) == "ddpm"
    if stochastic and generators is None:
        raise ValueError("the ddpm scheduler adds noise at every step: pass one generator per sample")
    options = {"generator": list(generators)} if stochastic and generators is not None else {}
    latents = noise.float() * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise.float()
    levels = objective.sampling_timesteps(scheduler).to(latents.device)  # at once: each copy would wait for the GPU
    for number, step in enumerate(scheduler.timesteps):
        t = levels[number].expand(len(latents))
        prediction = objective.scheduler_input(predict(latents, t), latents, t)
        latents = scheduler.step(prediction, step, latents, return_dict=False, **options)[0]
        if on_step is not None:
            on_step(number, latents)
    return latents
