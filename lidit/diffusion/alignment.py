"""Losses over pairs of pictures of one caption, of which one was rewarded more.

Both start from the predictions of the model that drew the pictures, at the same noisy latents: a
pair shares noise and timestep, so what is left of their difference is what the pictures differ in.

Shapes: P pairs; the 2 P rows of a batch are the P better pictures, then the P worse ones in the
same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lidit.config.align import AlignSettings
from lidit.diffusion.objectives import Objective


@dataclass(frozen=True)
class Pairs:
    """Noisy latents of pictures and what the model that drew them predicts there.

    x0, noise, x_t, drawn: [2 P, C, H, W]; t [2 P]; gap [P]: the better one's reward less the worse
    one's, over 0.
    """

    x0: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    x_t: torch.Tensor
    drawn: torch.Tensor
    gap: torch.Tensor


def pair_losses(
    settings: AlignSettings, objective: Objective, prediction: torch.Tensor, pairs: Pairs
) -> torch.Tensor:
    """The loss of each pair [P] for the network's prediction [2 P, C, H, W], float32."""
    if settings.kind == "dpo":
        return dpo(objective, prediction, pairs, settings.beta)
    return difference(objective, prediction, pairs, settings.strength, settings.away)


def difference(
    objective: Objective,
    prediction: torch.Tensor,
    pairs: Pairs,
    strength: float,
    away: float = 1.0,
) -> torch.Tensor:
    """Squared distance from `drawn` moved by strength x gap towards the better picture, away from
    the worse one.

    Negative-aware fine-tuning (arXiv 2509.16117) in closed form: its two implicit policies' losses
    differ from this by what the weights cannot change. The move is bounded, so a worse picture is
    left, not fled.
    """
    moved = strength * torch.cat([pairs.gap, -away * pairs.gap]).view(-1, 1, 1, 1)
    truth = objective.prediction(pairs.x0, pairs.x_t, pairs.t)
    target = pairs.drawn + moved * (truth - pairs.drawn)
    better, worse = distance(objective, prediction, target, pairs).chunk(2)
    return (better + worse) / 2


def dpo(objective: Objective, prediction: torch.Tensor, pairs: Pairs, beta: float) -> torch.Tensor:
    """-log sigmoid(-beta x (the better one's growth of error less the worse one's)) (arXiv
    2311.12908).
    """
    arguments = pairs.x0, pairs.noise, pairs.t, pairs.x_t
    growth = objective.loss(prediction, *arguments) - objective.loss(pairs.drawn, *arguments)
    better, worse = growth.chunk(2)
    losses = -F.logsigmoid(-beta * (better - worse))
    return torch.where(pairs.gap > 0, losses, torch.zeros_like(losses))  # no order, no lesson


def distance(
    objective: Objective, prediction: torch.Tensor, other: torch.Tensor, pairs: Pairs
) -> torch.Tensor:
    """Squared distance of two predictions at the same noisy latents, as the objective's loss weighs
    errors, [2 P].

    To the start's prediction it is, but for a factor of each timestep, the KL divergence of a
    sampling step's Gaussians.
    """
    truth = objective.prediction(pairs.x0, pairs.x_t, pairs.t)
    # The loss takes the prediction's error against the data: an error of exactly the difference.
    return objective.loss(
        truth + (prediction.float() - other), pairs.x0, pairs.noise, pairs.t, pairs.x_t
    )
