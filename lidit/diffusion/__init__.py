"""Objectives, samplers and guidance: how LI-DiT is trained and how images come out of it."""

from lidit.diffusion.guidance import GuidedPredictor
from lidit.diffusion.objectives import Objective, build_objective
from lidit.diffusion.samplers import Walk, initial_noise, sample, seeded_generators
from lidit.diffusion.schedules import Schedule, check_scheduler
from lidit.diffusion.validation import timestep_losses

__all__ = [
    "GuidedPredictor",
    "Objective",
    "Schedule",
    "Walk",
    "build_objective",
    "check_scheduler",
    "initial_noise",
    "sample",
    "seeded_generators",
    "timestep_losses",
]
