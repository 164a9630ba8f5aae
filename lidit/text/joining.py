"""Several blocks' states of one pass become one state per token.

Legend: B batch, T tokens, L layers, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lidit.text.rules import Reading

STANDARD_EPSILON = 1e-8  # as Cosmos-Predict 2.5 has it
RMS_EPSILON = 1e-6  # as BRIA FIBO 2 has it


def join_layers(states: Sequence[torch.Tensor], reading: Reading) -> torch.Tensor:
    """[B, T, W] of each layer -> [B, T, L * W], or [B, T, W] for their mean.

    Concatenated and separate layers lie one behind the other; interleaved, a channel's layers are
    neighbours.
    """
    if reading.normalise == "standard":
        states = [_standardised(state) for state in states]
    elif reading.normalise == "rms":
        states = [_unit_rms(state) for state in states]
    if reading.join == "mean":
        return torch.stack(list(states)).float().mean(0).to(states[0].dtype)
    if reading.join == "interleave":
        return torch.stack(list(states), dim=-1).flatten(-2)  # [B, T, W, L] -> [B, T, W * L]
    return torch.cat(list(states), dim=-1)


def _standardised(state: torch.Tensor) -> torch.Tensor:
    return (state - state.mean(-1, keepdim=True)) / (state.std(-1, keepdim=True) + STANDARD_EPSILON)


def _unit_rms(state: torch.Tensor) -> torch.Tensor:
    exact = state.float()
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + RMS_EPSILON)).to(
        state.dtype
    )
