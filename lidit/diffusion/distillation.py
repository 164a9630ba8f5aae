"""What a student is taught: an example per sample, made from a batch and its teacher. No step of an
optimizer here.

    guidance      the teacher's guided prediction at any noise level
    progressive   the one prediction that lands where the teacher lands after several steps
                  (arXiv 2202.00512)
    consistency   the one that lands where the student lands after one step of the teacher
                  (arXiv 2403.06807)

Shapes: B batch, C latent channels, H x W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from lidit.config import SamplerSettings
from lidit.config.distill import DistillSettings
from lidit.diffusion.guidance import ROUNDING, rescale
from lidit.diffusion.jumps import JumpGrid, jump, jump_target, regression
from lidit.diffusion.objectives import Objective
from lidit.models import LIDiT, TextStates

Text = Mapping[str, TextStates]
LOW_BITS = 2**12  # of a uniform float32 with 24 random bits: those below choose the guidance scale


class Student(Protocol):
    """The student's prediction as it is now: x_t [B, C, H, W], t [B], guidance [B] where it is an
    input.
    """

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor: ...


class Teacher:
    """A trained model's prediction as its own sampler uses it, at a timestep of each sample's own.

    Args:
        model: the network, which is never changed. objective: the network's.
        empty: states of one empty caption per encoder. sampler: scale, interval and rescale of
            guidance.
    """

    def __init__(
        self, model: LIDiT, objective: Objective, empty: Text, sampler: SamplerSettings
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.objective, self.empty, self.sampler = objective, dict(empty), sampler

    @torch.no_grad()
    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, text: Text, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, C, H, W], [B], states of B captions -> float32 prediction [B, C, H, W].

        scale: [B], in place of the sampler's one.
        """
        if scale is None:
            scale = torch.full_like(t, self.sampler.guidance_scale)
        low, high = self.sampler.guidance_interval
        acts = (t >= low - ROUNDING) & (t <= high + ROUNDING)
        scale = torch.where(acts, scale, torch.ones_like(scale))
        if self.model.takes_guidance:
            return self.model(x_t, t, text, guidance=scale).float()
        conditional = self.model(x_t, t, text).float()
        if bool((scale == 1).all()):
            return conditional
        # The empty caption for every sample: the refiners depend on its timestep.
        empty = {
            name: TextStates(e.states.expand(len(t), -1, -1), e.mask.expand(len(t), -1), e.prefix)
            for name, e in self.empty.items()
        }
        unconditional = self.model(x_t, t, empty).float()
        guided = unconditional + _beside(scale) * (conditional - unconditional)
        if self.sampler.guidance_rescale > 0:
            guided = rescale(guided, conditional, self.sampler.guidance_rescale)
        return torch.where(_beside(scale) == 1, conditional, guided)


@dataclass(frozen=True)
class Example:
    """The student is to predict `target` at x_t and t, with `guidance` as its input where it takes
    one.
    """

    x_t: torch.Tensor  # [B, C, H, W]
    t: torch.Tensor  # [B]
    guidance: torch.Tensor | None  # [B]
    target: torch.Tensor  # [B, C, H, W]
    landing: bool  # whether the target is a jump's

    def loss(self, objective: Objective, prediction: torch.Tensor) -> torch.Tensor:
        """Weighted squared error of each sample, [B], float32."""
        return regression(objective, prediction, self.target, self.t, self.landing)


class Lessons:
    """Turns batches into examples of one kind."""

    def __init__(self, settings: DistillSettings, teacher: Teacher) -> None:
        self.settings, self.teacher, self.objective = settings, teacher, teacher.objective
        self.grid = (
            None
            if settings.kind == "guidance"
            else JumpGrid.of(self.objective, *settings.walk_steps)
        )

    @torch.no_grad()
    def example(
        self, x0: torch.Tensor, noise: torch.Tensor, u: torch.Tensor, text: Text, student: Student
    ) -> Example:
        """From data and noise [B, C, H, W] and uniform u [B], which alone decide what is taught."""
        scale = self._scale(u)
        if self.grid is None:
            t = self.objective.timesteps(u)
            x_t = self.objective.add_noise(x0, noise, t)
            return Example(x_t, t, scale, self.teacher(x_t, t, text, scale), landing=False)
        # Which levels: a step of the student's, or for consistency any of the teacher's steps in
        # one.
        each = self.grid.levels.shape[1] - 1 if self.settings.kind == "consistency" else 1
        place = self.grid.pick(u, len(self.grid.levels) * each)
        levels = self.grid.levels.to(x0.device)[place // each]  # [B, m + 1]
        at = place % each
        t, s = levels.gather(1, at[:, None])[:, 0], levels[:, -1]
        x_t = self.objective.add_noise(x0, noise, t)
        if self.settings.kind == "progressive":
            landing = self._walked(x_t, levels, text, scale)
        else:
            then = levels.gather(1, at[:, None] + 1)[:, 0]
            landing = self._jumped(x_t, (t, then, s), text, scale, student)
        return Example(x_t, t, scale, jump_target(self.objective, landing, x_t, t, s), landing=True)

    def _scale(self, u: torch.Tensor) -> torch.Tensor | None:
        """The guidance scale that each sample learns, [B], where it is an input."""
        if self.settings.guidance_range is not None:
            low, high = self.settings.guidance_range
            return (low + (high - low) * (u.double() * LOW_BITS % 1)).float()
        fixed = self.teacher.sampler.guidance_scale
        return torch.full_like(u, fixed) if self.teacher.model.takes_guidance else None

    def _walked(
        self, x_t: torch.Tensor, levels: torch.Tensor, text: Text, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Where the teacher's steps over `levels` [B, m + 1] lead."""
        for begin, end in zip(levels.T[:-1], levels.T[1:], strict=True):
            x_t = jump(self.objective, self.teacher(x_t, begin, text, scale), x_t, begin, end)
        return x_t

    def _jumped(
        self,
        x_t: torch.Tensor,
        levels: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        text: Text,
        scale: torch.Tensor | None,
        student: Student,
    ) -> torch.Tensor:
        """Where one step of the teacher, from the first to the second of `levels`, and the
        student's own jump to the last lead.
        """
        t, then, s = levels
        stepped = jump(self.objective, self.teacher(x_t, t, text, scale), x_t, t, then)
        # Where the teacher's step ends the student's, it is the landing; nothing can be jumped from
        # its level.
        ended = then == s
        before = torch.where(ended, t, then)
        onward = jump(self.objective, student(stepped, before, scale), stepped, before, s)
        return torch.where(_beside(ended), stepped, onward)


def _beside(values: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)
