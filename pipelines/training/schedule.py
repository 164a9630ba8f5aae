"""The learning-rate schedule: a linear warm-up, then the recipe's `train.optimizer.schedule`."""

from __future__ import annotations

import math

from lidit.config import LoopSettings

# `constant_linear` keeps the full rate for this share of the steps, then falls in a line to this
# share of the rate.
DECAY_START, DECAY_END = 0.6, 0.1


def learning_rate(settings: LoopSettings, step: int) -> float:
    """Rate of the step with this number, counted from 0."""
    optimizer, progress = settings.optimizer, step / settings.steps
    factor = 1.0
    if optimizer.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif optimizer.schedule == "constant_linear" and progress > DECAY_START:
        factor = 1 - (1 - DECAY_END) * (progress - DECAY_START) / (1 - DECAY_START)
    warmup = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
    return optimizer.lr * factor * warmup
