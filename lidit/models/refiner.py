"""Linguistic token refiner: one per LLM, gives its causal states the context that comes after them
(paper 3.1).

Shapes: B batch, L = P + T prefix and caption tokens, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from lidit.models.layers import EPSILON, FeedForward, Modulation, SelfAttention, call_block
from lidit.models.states import attendable


class RefinerBlock(nn.Module):
    """x + g1 * SelfAttention(LayerNorm(x)), then x + g2 * FeedForward(LayerNorm(x)); g = 1 without
    gating.
    """

    def __init__(self, width: int, heads: int, gated: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=EPSILON)
        self.attention = SelfAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width, eps=EPSILON)
        self.feed_forward = FeedForward(width)
        self.gates = Modulation(width, 2) if gated else None

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor, condition: torch.Tensor | None
    ) -> torch.Tensor:
        attended = self.attention(self.attention_norm(hidden_states), mask)
        if self.gates is None:
            hidden_states = hidden_states + attended
            return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))
        attention_gate, feed_forward_gate = self.gates(condition)
        hidden_states = hidden_states + attention_gate * attended
        return hidden_states + feed_forward_gate * self.feed_forward(
            self.feed_forward_norm(hidden_states)
        )


class LinguisticRefiner(nn.Module):
    """N blocks of self-attention and feed-forward, scaled by adaptive gates that start at zero.

    `causal` keeps the LLM's mask (table 3); `gated=False` drops the gates (table 5); `mixing=False`
    lets attention
    see only the own token: the same parameters without any flow between tokens, the control for "it
    is the mixing".
    """

    def __init__(
        self, width: int, heads: int, depth: int, causal: bool, gated: bool, mixing: bool
    ) -> None:
        super().__init__()
        self.causal = causal
        self.mixing = mixing
        self.blocks = nn.ModuleList(RefinerBlock(width, heads, gated) for _ in range(depth))
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor, condition: torch.Tensor | None
    ) -> torch.Tensor:
        """`hidden_states` [B, L, D], `mask` bool [B, L], `condition` [B, D] (None without gates) ->
        [B, L, D].

        Masked tokens come out as zeros.
        """
        allowed = self.attention_mask(mask)
        for block in self.blocks:
            hidden_states = call_block(self, block, hidden_states, allowed, condition)
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        return hidden_states

    def attention_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Which token may attend to which: bool [B, 1, 1, L] for full attention, otherwise
        [B, 1, L, L].
        """
        if self.mixing and not self.causal:
            return attendable(mask)[:, None, None, :]
        length = mask.shape[1]
        own = torch.eye(length, dtype=torch.bool, device=mask.device)
        if not self.mixing:
            return own.expand(len(mask), 1, length, length)
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        # A padded query keeps itself: a softmax over nothing would be NaN and poison the gradient.
        return (causal & mask[:, None, None, :]) | own
