"""Closed forms of distillation: a jump from one noise level to another, and the prediction that
makes it.

A deterministic step of DDIM, or of Euler on a straight path, keeps the noise that a prediction
points to and changes its share. So where a teacher lands after several steps, one prediction lands
as well (arXiv 2202.00512, appendix G).

Shapes: B batch, C latent channels, H x W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lidit.config import SamplerSettings
from lidit.diffusion.objectives import CLEAN_FLOOR, Objective
from lidit.errors import InputError


def jump(
    objective: Objective,
    prediction: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
) -> torch.Tensor:
    """From x_t [B, C, H, W] at t [B] to s [B] < t along a prediction: x_s, float32."""
    (data_t, noise_t), (data_s, noise_s) = _shares(objective, t, x_t), _shares(objective, s, x_t)
    x0 = objective.estimate(prediction, x_t, t)
    return data_s * x0 + noise_s * (x_t.float() - data_t * x0) / noise_t


def jump_target(
    objective: Objective, x_s: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """The prediction at x_t and t whose jump to s lands on x_s: the inverse of `jump` in its
    prediction.
    """
    (data_t, noise_t), (data_s, noise_s) = _shares(objective, t, x_t), _shares(objective, s, x_t)
    kept = noise_s / noise_t
    x0 = (x_s.float() - kept * x_t.float()) / (data_s - kept * data_t)
    return objective.prediction(x0, x_t, t)


def regression(
    objective: Objective,
    prediction: torch.Tensor,
    target: torch.Tensor,
    t: torch.Tensor,
    landing: bool,
) -> torch.Tensor:
    """Weighted squared error of each sample between two predictions of one objective, [B], float32.

    The weights are those of the objective's own loss. landing: the targets are jumps; where noise
    is predicted, an error then weighs as it does in the data, by the truncated signal-to-noise
    ratio max(SNR, 1) of Salimans and Ho: at little signal a small error of the noise is a large one
    of the picture.
    """
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)
    if objective.kind == "clean":
        return error / t.float().clamp_min(CLEAN_FLOOR).square()
    if objective.kind == "ddpm" and landing:
        data, noise = objective.path(t)
        return error * (noise / data).square().clamp_min(1)
    return error


@dataclass(frozen=True)
class JumpGrid:
    """The student's steps on [0, 1], each cut into the teacher's: nested, so that both walk between
    the same levels.

    Args:
        levels: from the begin of each of the student's n steps to its end, over the teacher's m
            steps in it,
            [n, m + 1]; the end is the next begin, at last `clean_end`.
    """

    levels: torch.Tensor

    @classmethod
    def of(cls, objective: Objective, steps: int, teacher_steps: int) -> JumpGrid:
        """For `steps` of a student and `teacher_steps` of its teacher in all.

        Raises InputError unless the second is a multiple of the first that the objective's levels
        can tell apart.
        """
        each = teacher_steps // steps
        if teacher_steps % steps:
            raise InputError(
                f"teacher_steps: {teacher_steps} is no multiple of the student's {steps} steps "
                "(sampler_steps): each "
                "of them learns a whole number of the teacher's"
            )
        # The student's own schedule, as it will sample.
        begins = objective.sampling_timesteps(
            objective.scheduler(SamplerSettings(steps=steps))
        ).double()
        ends = torch.cat([begins[1:], begins.new_tensor([objective.clean_end])])
        shares = torch.linspace(0, 1, each + 1, dtype=torch.float64)
        levels = begins[:, None] + shares * (ends - begins)[:, None]
        if objective.kind == "ddpm":
            levels = (levels * objective.train_steps).round() / objective.train_steps
        if not bool((levels.diff(dim=1) < 0).all()):
            raise InputError(
                f"teacher_steps: {teacher_steps} steps are finer than the objective's "
                f"{objective.train_steps} noise "
                "levels (objective.train_steps); take fewer"
            )
        return cls(levels.float())

    @staticmethod
    def pick(u: torch.Tensor, count: int) -> torch.Tensor:
        """Uniform u [B] in [0, 1) -> one of `count` places for each sample, [B] long."""
        return (u.double() * count).long().clamp(0, count - 1)


def _shares(
    objective: Objective, t: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`path` at t [B], [B, 1, 1, 1] each."""
    data, noise = objective.path(t.to(like.device))
    shape = (-1, *[1] * (like.dim() - 1))
    return data.view(shape), noise.view(shape)
