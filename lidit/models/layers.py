"""Layers shared by the refiners and the transformer.

Shapes: B batch, L query tokens, S key tokens, H heads, E width of a head, D = H * E.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from lidit.errors import InputError

EPSILON = 1e-6
FREQUENCIES = 256


class SelfAttention(nn.Module):
    """Multi-head self-attention with RMSNorm on queries and keys (paper 3.2, "QK-norm"). [B, L, D]
    -> [B, L, D].
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.RMSNorm(width // heads, eps=EPSILON)
        self.key_norm = nn.RMSNorm(width // heads, eps=EPSILON)
        self.output = nn.Linear(width, width)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`mask` bool, broadcastable to [B, H, L, L], True where a query may attend."""
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)  # each [B, L, D]
        # [B, L, H, E]
        query, key = (
            self.query_norm(split(query, self.heads)),
            self.key_norm(split(key, self.heads)),
        )
        return self.output(attend(query, key, split(value, self.heads), mask))


class CrossAttention(nn.Module):
    """Multi-head cross-attention with RMSNorm on queries and keys. [B, L, D], [B, S, D] ->
    [B, L, D].
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query_norm = nn.RMSNorm(width // heads, eps=EPSILON)
        self.key_norm = nn.RMSNorm(width // heads, eps=EPSILON)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`mask` bool [B, S], True at keys that exist, at least one per row.

        rows: [B] long, each query's place in a `context` and `mask` of fewer rows, whose keys and
        values are shared.
        """
        query = self.query_norm(split(self.query(hidden_states), self.heads))  # [B, L, H, E]
        key, value = self.key_value(context).chunk(2, dim=-1)  # each [B, S, D]
        key = self.key_norm(split(key, self.heads))  # [B, S, H, E]
        if rows is not None:
            key, value, mask = key[rows], value[rows], mask[rows]
        return self.output(attend(query, key, split(value, self.heads), mask[:, None, None, :]))


def split(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, D] -> [B, L, H, E]."""
    return tokens.unflatten(-1, (heads, -1))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """[B, L, H, E], [B, S, H, E] twice, `mask` broadcastable to [B, H, L, S] -> [B, L, D]."""
    # [B, H, L or S, E]
    query, key, value = (tokens.transpose(1, 2) for tokens in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """Linear to four times the width, GELU, Linear back. [B, L, D] -> [B, L, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.contract(F.gelu(self.expand(hidden_states), approximate="tanh"))


class Modulation(nn.Module):
    """`count` vectors from a condition, zero at start (adaLN-Zero). [B, D] -> `count` times
    [B, 1, D].
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All zero: a gate starts closed, a shift at 0, a scale at 1; the layer
        starts as identity.
        """
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(F.silu(condition))[:, None, :].chunk(self.count, dim=-1)


def shift_scale(
    hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """A normalised [B, L, D] scaled by 1 + `scale` and shifted by `shift`, [B, 1, D] each."""
    return torch.addcmul(shift, hidden_states, 1 + scale)


def gated_add(
    hidden_states: torch.Tensor, gate: torch.Tensor, update: torch.Tensor
) -> torch.Tensor:
    """[B, L, D] plus a layer's output `update` [B, L, D], scaled by `gate` [B, 1, D]."""
    return torch.addcmul(hidden_states, gate, update)


def normalise(hidden_states: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last dimension, without parameters: the modulation takes their place."""
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=EPSILON)


def compute_dtype(layer: nn.Linear) -> torch.dtype:
    """What the layer computes in: where diffusers' layerwise casting stores its weights smaller,
    not their dtype.
    """
    registry = getattr(layer, "_diffusers_hook", None)
    casting = registry.get_hook("layerwise_casting") if registry is not None else None
    dtype: torch.dtype = layer.weight.dtype if casting is None else casting.compute_dtype
    return dtype


class PlainAttention:
    """What diffusers' models offer for attention processors, refused: a switch that changes nothing
    would mislead.
    """

    def set_attention_backend(self, backend: str) -> None:
        """Accept the backend that is used, torch's own.

        Args:
            backend: `native`.

        Raises:
            InputError: Another backend.
        """
        if backend.lower() != "native":
            raise InputError(
                f"attention backend {backend!r}: attention here is torch's "
                "scaled_dot_product_attention; choose its "
                "kernel with torch.nn.attention.sdpa_kernel"
            )

    def enable_xformers_memory_efficient_attention(self, attention_op: object = None) -> None:
        """Refuse: there is no attention processor that could be exchanged.

        Args:
            attention_op: Not looked at.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "xformers attention: attention here is torch's scaled_dot_product_attention, as fast"
        )

    def enable_cache(self, config: object) -> None:
        """Refuse: diffusers' caches hook block classes and processors that it knows.

        Args:
            config: A cache's configuration of diffusers, named in the message.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{type(config).__name__}: the caches of diffusers do not know these blocks; draw "
            "with fewer steps instead"
        )


class TimestepEmbedder(nn.Module):
    """Sinusoids of 1000 t, then two linear layers. t float [B] in [0, 1] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(FREQUENCIES, width)
        self.contract = nn.Linear(width, width)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        frequencies = get_timestep_embedding(
            timestep,
            FREQUENCIES,
            flip_sin_to_cos=True,
            downscale_freq_shift=0,
            scale=1000,
            # [B, 256], float32 whatever the model's dtype: t in bfloat16 would merge neighbouring
            # steps
        )
        return self.contract(F.silu(self.expand(frequencies.to(compute_dtype(self.expand)))))


class GuidanceEmbedder(TimestepEmbedder):
    """A guidance scale as an input, zero at start: the network then draws as without it. [B] ->
    [B, D].
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, guidance: torch.Tensor) -> torch.Tensor:
        # Scales are tens of what timesteps are; the fastest sinusoid should not turn between two
        # that are alike.
        return super().forward(guidance / 100)


def call_block(owner: Any, block: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    """`block(*inputs)`, computed again in the backward pass where diffusers'
    `enable_gradient_checkpointing` reached `owner`, whose flag it sets.
    """
    if owner.gradient_checkpointing and torch.is_grad_enabled():
        return owner._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


def initialise(module: nn.Module) -> None:
    """Starting weights of the whole model; call once, on the root.

    Xavier-uniform linear layers with zero bias as in DiT; then every `Modulation` and
    `GuidanceEmbedder` back to zero.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, Modulation | GuidanceEmbedder):
            part.reset_parameters()
