"""Validation loss: held-out samples at fixed noise levels, so steps can be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist

from lidit.config.fields import LARGEST_SEED
from lidit.data.assembler import TrainingBatch
from lidit.diffusion import timestep_losses
from lidit.models import TextStates
from pipelines.training.engine import Engine

SEED_STRIDE = 1_000_003  # between the noise seeds of two batches: more than a batch has samples


def _predict(
    engine: Engine, text: Mapping[str, TextStates], x_t: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    predicted: torch.Tensor = engine.deepspeed(x_t.to(engine.compute_dtype), t, text)
    return predicted


@torch.no_grad()
def validation_loss(
    engine: Engine, batches: list[TrainingBatch], first: int, seed: int, levels: int = 8
) -> dict[str, float]:
    """Mean loss over the held-out batches of all workers, in all and per timestep. Collective.

    first: place of this worker's first sample in a global batch; a sample's noise goes by its
    place.
    """
    total, count = torch.zeros(levels, device=engine.device), torch.zeros((), device=engine.device)
    engine.deepspeed.eval()
    for number, batch in enumerate(batches):
        moved = batch.to(engine.device)
        seeds = [
            (seed + SEED_STRIDE * number + first + i) & LARGEST_SEED for i in range(len(batch.keys))
        ]
        predict = partial(_predict, engine, moved.text)
        losses = timestep_losses(predict, engine.objective, moved.latents, seeds, levels)  # [B, K]
        total, count = total + losses.sum(0), count + len(losses)
    engine.deepspeed.train()
    # Sums, not means: workers may hold unequal shares of a batch.
    dist.all_reduce(total)
    dist.all_reduce(count)
    means = (total / count).tolist()
    return {"validation/loss": math.fsum(means) / levels} | {
        f"validation/loss_t{(i + 0.5) / levels:.3f}": value for i, value in enumerate(means)
    }
