"""From noise to latents with diffusers' schedulers.

Shapes: B batch, C latent channels, H x W latent size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler

from lidit.config import SamplerSettings
from lidit.diffusion.objectives import Objective

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample, so that neither batch nor device decides what a sample looks
    like.
    """
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def initial_noise(
    generators: Sequence[torch.Generator],
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Standard normal noise [B, *shape], sample i from generator i, drawn where the
    generator is.
    """
    drawn = [
        torch.randn(shape, generator=generator, device=generator.device) for generator in generators
    ]
    return torch.stack(drawn).to(device)


class Walk:
    """Latents on their way from noise to data, one step of their scheduler at a time.

    A scheduler of diffusers keeps the step and the predictions before it, so every walk has its
    own.

    Args:
        objective, sampler: which scheduler, and its steps. noise: [B, C, H, W] to start from.
        generators: one per sample, for the schedulers that add noise on the way ("ddpm"); required
            there.
        scheduler: in place of the sampler's, with its steps set (`Schedule.prepared`).
    Raises:
        InputError: the sampler's scheduler cannot run this objective.
        ValueError: "ddpm" without generators.
    """

    def __init__(
        self,
        objective: Objective,
        noise: torch.Tensor,
        sampler: SamplerSettings,
        generators: Sequence[torch.Generator] | None = None,
        scheduler: Any | None = None,
    ) -> None:
        if scheduler is None:
            scheduler = objective.scheduler(sampler)
        stochastic = isinstance(scheduler, DDPMScheduler)
        if stochastic and generators is None:
            raise ValueError(
                "the ddpm scheduler adds noise at every step: pass one generator per sample"
            )
        self.objective, self.scheduler = objective, scheduler
        takes = "generator" in inspect.signature(scheduler.step).parameters
        self.options = {"generator": list(generators)} if takes and generators is not None else {}
        # Not every scheduler starts from noise of deviation 1.
        scale = getattr(scheduler, "init_noise_sigma", None)
        self.latents = noise.float() if scale is None else noise.float() * scale  # [B, C, H, W]
        on_cpu = objective.sampling_timesteps(scheduler)
        self.levels: list[float] = on_cpu.tolist()  # t of every step
        self._levels = on_cpu.to(noise.device)  # at once: each copy would wait for the GPU
        self.number = 0  # of the next step

    @property
    def finished(self) -> bool:
        return self.number == len(self.levels)

    @property
    def network_input(self) -> torch.Tensor:
        """The latents as the network was trained to see them, [B, C, H, W]: some schedulers hold
        them scaled.
        """
        scale = getattr(self.scheduler, "scale_model_input", None)
        if scale is None:
            return self.latents
        scaled: torch.Tensor = scale(self.latents, self.scheduler.timesteps[self.number])
        return scaled

    @property
    def t(self) -> torch.Tensor:
        """t of the next step, [B] the same value throughout, on the latents' device."""
        return self._levels[self.number].expand(len(self.latents))

    def advance(self, prediction: torch.Tensor) -> None:
        """Take the next step with the network's prediction [B, C, H, W] at `latents` and `t`."""
        taken = self.objective.scheduler_input(prediction, self.latents, self.t)
        step = self.scheduler.timesteps[self.number]
        self.latents = self.scheduler.step(
            taken, step, self.latents, return_dict=False, **self.options
        )[0]
        self.number += 1

    def estimate(self, prediction: torch.Tensor) -> torch.Tensor:
        """The data [B, C, H, W] that a prediction at `latents` and `t` points to: a preview."""
        return self.objective.estimate(prediction, self.latents, self.t)


@torch.no_grad()
def sample(
    predict: Predict,
    objective: Objective,
    noise: torch.Tensor,
    sampler: SamplerSettings,
    generators: Sequence[torch.Generator] | None = None,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Walk from `noise` [B, C, H, W] to latents x0 [B, C, H, W], float32; refuses what `Walk` does.

    Args:
        predict: (x_t, t [B] in [0, 1]) -> the network's prediction, guidance included (see
            `GuidedPredictor`).
        generators: one per sample, for the schedulers that add noise on the way ("ddpm"); required
            there.
        on_step: called after every step with its number and the latents.
    """
    walk = Walk(objective, noise, sampler, generators)
    while not walk.finished:
        walk.advance(predict(walk.latents, walk.t))
        if on_step is not None:
            on_step(walk.number - 1, walk.latents)
    return walk.latents
