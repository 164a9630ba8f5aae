"""Every random number of training, a pure function of (seed, purpose, epoch, unit, row).

Counter-based: a draw needs no state and no history, so any worker can make the draws of any sample,
and a resumed run makes the same ones. The mixer is SplitMix64's finaliser (Steele et al., 2014),
applied once per key: integer arithmetic only, the same bits on every machine and in every numpy.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """What a draw is for: two purposes never share numbers. The values are part of the format of a
    run.
    """

    UNITS = 1
    ROWS = 2
    BATCHES = 3
    CAPTION = 4
    DROPOUT = 5
    TIMESTEP = 6
    NOISE = 7
    LATENT = 8
    HOLDOUT = 9
    KEEP = 10
    PROMPT = 11
    PICTURE = 12
    PAIR = 13


def draw(seed: int, purpose: Purpose, *keys: ArrayLike) -> NDArray[np.uint64]:
    """Uniform 64-bit numbers, one per element of the broadcast `keys` (integers of any shape)."""
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seed, np.uint64) * GOLDEN + np.uint64(purpose))
        for key in keys:
            state = _mix((state ^ np.asarray(key).astype(np.uint64)) + GOLDEN)
    return np.asarray(state, np.uint64)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)


def uniform(seed: int, purpose: Purpose, *keys: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 bits."""
    return (draw(seed, purpose, *keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, seed: int, purpose: Purpose, *keys: int) -> NDArray[np.int64]:
    """A permutation of range(count). Ties of 64-bit keys are broken by position, so it is always
    one.
    """
    return np.argsort(draw(seed, purpose, *keys, np.arange(count)), kind="stable")


def fill_gaussian(out: torch.Tensor, numbers: NDArray[np.uint64]) -> None:
    """Standard normal noise into `out` [B, ...] float32, row i a function of `numbers[i]` alone.

    On the CPU whatever the training device, so that it is the same; written in place, because fresh
    memory for every sample costs more than the numbers.
    """
    generator = torch.Generator()
    for row, number in zip(out, (numbers >> np.uint64(1)).tolist()):
        generator.manual_seed(number)
        row.normal_(generator=generator)
