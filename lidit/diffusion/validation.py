"""Validation loss by timestep, on fixed noise: two evaluations of the same weights give the same
number.

Shapes: B batch, C latent channels, H x W latent size, K timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lidit.diffusion.objectives import Objective
from lidit.diffusion.samplers import initial_noise, seeded_generators


def validation_timesteps(objective: Objective, count: int) -> torch.Tensor:
    """`count` timesteps at the centres of equal parts of [0, 1], on the objective's grid. [K]"""
    centres = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if objective.kind == "ddpm":
        centres = (centres * objective.train_steps).floor() / objective.train_steps
    return centres.float()


@torch.no_grad()
def timestep_losses(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    objective: Objective,
    x0: torch.Tensor,
    seeds: Sequence[int],
    count: int = 8,
) -> torch.Tensor:
    """Loss of each sample at each of `count` timesteps: x0 [B, C, H, W] -> [B, K], float32.

    Sample i always gets the noise of seeds[i], whatever batch it is in.
    """
    noise = initial_noise(
        seeded_generators(seeds), (x0.shape[1], x0.shape[2], x0.shape[3]), x0.device
    )
    losses = []
    for level in validation_timesteps(objective, count).to(x0.device):
        t = level.expand(len(x0))
        x_t = objective.add_noise(x0, noise, t)
        losses.append(objective.loss(predict(x_t, t), x0, noise, t, x_t))
    return torch.stack(losses, dim=1)
