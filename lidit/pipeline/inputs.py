"""What a call of the pipeline is given: prompts or their states, and seeds, brought into one form or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from lidit.config.fields import check_prompts, check_seeds
from lidit.errors import InputError
from lidit.models import TextStates


def listed_prompts(prompt: str | Sequence[str] | None, states: Mapping[str, TextStates] | None) -> list[str] | None:
    """The prompts as a list; None where states are given instead. Raises InputError unless it is one of the two."""
    if (prompt is None) == (states is None):
        raise InputError("give either prompt or states")
    if prompt is None:
        return None
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise InputError("give at least one prompt")
    check_prompts(prompts, "the pipeline")
    return prompts


def image_count(prompts: list[str] | None, states: Mapping[str, TextStates] | None) -> int:
    if prompts is not None:
        return len(prompts)
    assert states is not None
    return len(next(iter(states.values())).states)


def seed_per_image(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        return [int(value) for value in torch.randint(0, 2**31, (count,))]
    seeds = [seed] * count if isinstance(seed, (int, np.integer)) else list(seed)
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} prompts: give one, or one per prompt")
    check_seeds(seeds, "the pipeline")
    return [int(value) for value in seeds]
