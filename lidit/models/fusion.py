"""Collaborative refiner: the LLMs' tokens read each other before they become one condition (paper
3.1, table 6).

Shapes: B batch, L_i tokens of LLM i, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lidit.models.layers import (
    CrossAttention,
    FeedForward,
    Modulation,
    call_block,
    normalise,
    shift_scale,
)
from lidit.models.states import attendable


class FusionBranch(nn.Module):
    """One LLM's side: cross-attention to all the others, then feed-forward, each with scale, shift,
    output scale.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = CrossAttention(width, heads)
        self.feed_forward = FeedForward(width)
        self.modulation = Modulation(width, 6)

    def forward(
        self,
        hidden_states: torch.Tensor,
        others: torch.Tensor,
        others_mask: torch.Tensor,
        condition: torch.Tensor,
    ) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        queries = shift_scale(normalise(hidden_states), shift1, scale1)
        hidden_states = hidden_states + gate1 * self.attention(queries, others, others_mask)
        return hidden_states + gate2 * self.feed_forward(
            shift_scale(normalise(hidden_states), shift2, scale2)
        )


class CollaborativeRefiner(nn.Module):
    """`depth` blocks of one `FusionBranch` per LLM. All branches of a block read the
    block's input.
    """

    def __init__(self, branches: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.branches = branches
        # block by block
        self.blocks = nn.ModuleList(FusionBranch(width, heads) for _ in range(depth * branches))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor],
        conditions: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Per LLM: `hidden_states` [B, L_i, D], `masks` bool [B, L_i], `conditions` [B, D] ->
        [B, L_i, D] each.

        Masked tokens come out as zeros.
        """
        states = list(hidden_states)
        indices = range(len(states))
        keys = [
            attendable(torch.cat([masks[j] for j in indices if j != i], dim=1)) for i in indices
        ]
        for first in range(0, len(self.blocks), self.branches):
            normalised = [normalise(branch_states) for branch_states in states]
            others = [torch.cat([normalised[j] for j in indices if j != i], dim=1) for i in indices]
            states = [
                call_block(
                    self, self.blocks[first + i], states[i], others[i], keys[i], conditions[i]
                ).masked_fill(~masks[i][..., None], 0)
                for i in indices
            ]
        return states
