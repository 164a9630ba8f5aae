"""The linear half of `storage: coded`: standardised states to integers of one uniform step, and
back.

What a model sees of a state is z = clamp((x - mean) / deviation, +-10), so z is what is coded. A
fixed orthonormal basis takes its channels' correlation out; one step for all components is the best
share of bits among them (reverse water-filling), and fixes the error whatever the text. A small
token is divided by its own size first, so that its relative error is not far from the others'.

Legend: N tokens, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from lidit.store.coding.rans import Model

LIMIT = 10.0  # deviations; a model clamps there
# of a channel's mean: a smaller deviation is float32 rounding, and the channel is only centred
CONSTANT = 1e-6
STEPS_PER_OCTAVE, MIDDLE = 16, 128  # of a token's scale: one byte, from 2^-8 to 2^8
# Tokens of most sizes are divided by the same, .84: only so does a text of larger tokens than the
# calibration captions' keep the error that was asked for. Smaller tokens are divided by their size,
# for their error counts in their own size.
LARGEST = 124
ROUNDING = 0.5  # a component is rounded to the nearest step


@dataclass(frozen=True)
class CodeQuality:
    """What was measured of a code on captions that it was not made from.

    Args:
        bits: Per dimension, the entropy coder's states included.
        rms: Error in deviations.
        worst_token: The largest error of a token, as a share of its own size.
        swap: Error of the difference that exchanging two words makes, as a share of it; None where
            no caption has two.
    """

    bits: float
    rms: float
    worst_token: float
    swap: float | None = None


@dataclass(frozen=True)
class StateCode:
    """What a family's coded states are read with; the same for every unit.

    Args:
        basis: [W, W] float32; column i is component i, columns are orthonormal.
        step: In sizes of a token.
        model: Frequencies for the entropy coder; None where states are only rounded as a family
            stores them.
        quality: What was measured when the code was made.
    """

    basis: torch.Tensor
    step: float
    model: Model | None = None
    quality: CodeQuality | None = None

    @property
    def back(self) -> torch.Tensor:
        """[W, W] float32: whole steps of a token @ this, times the size of its step, are z."""
        return self.basis.T.contiguous()

    def to(self, device: torch.device | str) -> StateCode:
        """The same code with its tensors on a device."""
        return replace(self, basis=self.basis.to(device))


class CodedStates(NamedTuple):
    """One caption's states as they are coded: whole steps [T, W] int16 or int8, and the size [T]
    float32 of a token's step.
    """

    values: torch.Tensor
    size: torch.Tensor


def varying(mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """The deviations [W] to divide by: 1 for a channel that is constant but for rounding."""
    return torch.where(deviation > CONSTANT * mean.abs(), deviation, torch.ones_like(deviation))


def standardise(flat: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """States [N, W] -> z [N, W] float32, as a model sees them."""
    return flat.float().sub(mean).div_(varying(mean, deviation)).clamp_(-LIMIT, LIMIT)


def quantise(z: torch.Tensor, code: StateCode) -> tuple[torch.Tensor, torch.Tensor]:
    """z [N, W] -> integers [N, W] int16 and each token's scale [N] uint8."""
    scale = token_scale(z)
    components = (z @ code.basis).div_(step_sizes(scale, code.step)[:, None])  # [N, W]
    return rounded(components).to(torch.int16), scale


def rounded(components: torch.Tensor) -> torch.Tensor:
    """Components in steps -> whole steps."""
    return components.abs().add_(ROUNDING).floor_().copysign_(components)


def token_scale(z: torch.Tensor) -> torch.Tensor:
    """The byte [N] uint8 that names what each token is divided by: its rms over the channels, at
    most .84.
    """
    size = z.square().mean(-1).sqrt().clamp_min(2.0**-8)  # [N]
    return (size.log2() * STEPS_PER_OCTAVE + MIDDLE).round().clamp(0, LARGEST).to(torch.uint8)


def step_sizes(scale: torch.Tensor, step: float) -> torch.Tensor:
    """What one step of each token is, in deviations: [N] float32."""
    return torch.exp2((scale.float() - MIDDLE) / STEPS_PER_OCTAVE) * step


def restore(values: torch.Tensor, scale: torch.Tensor, code: StateCode) -> torch.Tensor:
    """Integers [N, W] and scales [N] -> z [N, W] float32: the inverse of `quantise` but for
    rounding.
    """
    z = values.float() @ code.back
    return z.mul_(step_sizes(scale, code.step)[:, None]).clamp_(-LIMIT, LIMIT)


def exactly(z: torch.Tensor, code: StateCode | None) -> CodedStates:
    """z [T, W] in whole steps so small that they lose no more than float32 arithmetic: for states
    beside coded ones. None: beside int8 ones, whose steps are z's own.
    """
    components = z if code is None else z @ code.basis  # [T, W]
    size = components.abs().amax(-1).clamp_min(1e-9) / 32767  # [T]
    return CodedStates((components / size[:, None]).round().to(torch.int16), size)
