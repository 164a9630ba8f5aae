"""The diffusion transformer (paper 3.2).

Shapes: B batch, C latent channels, H x W latent size, p patch size, h = H / p, w = W / p, N = h * w
image tokens, S condition tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from lidit.errors import InputError
from lidit.models.layers import (
    CrossAttention,
    FeedForward,
    GuidanceEmbedder,
    Modulation,
    PlainAttention,
    SelfAttention,
    TimestepEmbedder,
    call_block,
    compute_dtype,
    gated_add,
    normalise,
    shift_scale,
)
from lidit.models.states import PromptCondition


class PositionBlock(nn.Module):
    """A convolutional ResBlock in place of a position table: zero padding at the border tells where
    a token is.

    Being a convolution, it takes any height and width (paper 3.2). [B, D, h, w] -> [B, D, h, w].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        groups = math.gcd(32, width)
        self.norm1 = nn.GroupNorm(groups, width)
        self.convolution1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width)
        self.convolution2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        residual = self.convolution1(F.silu(self.norm1(image)))
        return image + self.convolution2(F.silu(self.norm2(residual)))


class LIDiTBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; shift, scale and gate for each of
    the three.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, 9)
        self.self_attention = SelfAttention(width, heads)
        self.cross_attention = CrossAttention(width, heads)
        self.feed_forward = FeedForward(width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        context_mask: torch.Tensor,
        condition: torch.Tensor,
        context_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, N, D], [B, S, D], bool [B, S], [B, D] -> [B, N, D]; context_rows as
        `PromptCondition.rows`.
        """
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = self.modulation(
            condition
        )

        seen = shift_scale(normalise(hidden_states), shift1, scale1)
        attended = self.self_attention(seen)
        hidden_states = gated_add(hidden_states, gate1, attended)

        seen = shift_scale(normalise(hidden_states), shift2, scale2)
        attended = self.cross_attention(seen, context, context_mask, context_rows)
        hidden_states = gated_add(hidden_states, gate2, attended)

        seen = shift_scale(normalise(hidden_states), shift3, scale3)
        expanded = self.feed_forward(seen)
        return gated_add(hidden_states, gate3, expanded)


class LIDiTTransformer(PlainAttention, ModelMixin, ConfigMixin):
    """Noisy latents + timestep + text condition -> prediction of the same shape.

    Args:
        channels: latent channels C, in and out. width, depth, heads: D, number of blocks, attention
            heads.
        patch_size: p; heights and widths must be divisible by it, any such size works.
        guidance_input: whether the guidance scale is an input, as of a distilled model that needs
            no second pass.
    Raises:
        InputError: width not divisible by heads.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LIDiTBlock"]
    _repeated_blocks = ["LIDiTBlock"]

    @register_to_config
    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        patch_size: int,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"width {width} is not divisible by {heads} heads")
        patch_values = channels * patch_size**2
        self.patch_size = patch_size
        self.patch_embedder = nn.Linear(patch_values, width)
        self.position = PositionBlock(width)
        self.timestep_embedder = TimestepEmbedder(width)
        self.pooled_embedder = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.guidance_embedder = GuidanceEmbedder(width) if guidance_input else None
        self.blocks = nn.ModuleList(LIDiTBlock(width, heads) for _ in range(depth))
        self.final_modulation = Modulation(width, 2)
        self.final_linear = nn.Linear(width, patch_values)
        self.gradient_checkpointing = False
        # of `gradient_checkpointing`: this many blocks to one that is computed again
        self.checkpointed_every = 1

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        condition: PromptCondition,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`hidden_states` [B, C, H, W], `timestep` float [B] in [0, 1] (0 data, 1 noise) ->
        [B, C, H, W].

        guidance: scale of each sample, [B], for a model that takes it; None is 1, no guidance. The
        result has the weights' dtype. Raises InputError where height or width is not divisible by
        the patch size.
        """
        height, width = (side // self.patch_size for side in hidden_states.shape[2:])
        if (height * self.patch_size, width * self.patch_size) != tuple(hidden_states.shape[2:]):
            raise InputError(
                f"latents of {hidden_states.shape[2]} x {hidden_states.shape[3]} cannot be cut "
                "into patches of "
                f"{self.patch_size}: both sides must be multiples of it"
            )
        patches = F.pixel_unshuffle(
            hidden_states.to(compute_dtype(self.patch_embedder)), self.patch_size
        )
        tokens = self.patch_embedder(patches.flatten(2).transpose(1, 2))  # [B, N, D]
        # [B, D, h, w], channels last in memory
        image = tokens.transpose(1, 2).unflatten(2, (height, width))
        tokens = self.position(image).flatten(2).transpose(1, 2)  # [B, N, D]

        pooled = condition.pooled if condition.rows is None else condition.pooled[condition.rows]
        vector = self.timestep_embedder(timestep) + self.pooled_embedder(pooled)  # [B, D]
        if self.guidance_embedder is not None:
            scale = torch.ones_like(timestep) if guidance is None else guidance
            vector = vector + self.guidance_embedder(scale)
        for number, block in enumerate(self.blocks):
            read = condition.of_block(number)
            inputs = tokens, read, condition.mask, vector, condition.rows
            again = number % self.checkpointed_every == 0
            tokens = call_block(self, block, *inputs) if again else block(*inputs)

        shift, scale = self.final_modulation(vector)
        patches = self.final_linear(shift_scale(normalise(tokens), shift, scale))  # [B, N, C p p]
        return F.pixel_shuffle(
            patches.transpose(1, 2).unflatten(2, (height, width)), self.patch_size
        )
