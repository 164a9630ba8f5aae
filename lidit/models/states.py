"""What enters and leaves the conditioner: LLM states per encoder, and the one text condition of the
transformer.

Shapes: B batch, T caption tokens, P prefix tokens, W width of an LLM, S condition tokens, D width
of the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class TextStates:
    """The states of one encoder for a batch of captions, as stored: neither normalised nor
    projected.

    Args:
        states: [B, T, W], any floating dtype: B captions of up to T tokens, W the LLM's width.
        mask: [B, T] bool, True at real tokens. Values elsewhere never matter.
        prefix: [P, W], the states of the instruction, one copy for all captions; P may be 0.
        size: None, or [B, T] float32 where `states` are whole steps [B, T, W] of a coded family:
            what a step of each
            token is. The prefix is never coded.
    """

    states: torch.Tensor
    mask: torch.Tensor
    prefix: torch.Tensor
    size: torch.Tensor | None = None

    @classmethod
    def collate(cls, captions: Sequence[torch.Tensor], prefix: torch.Tensor) -> TextStates:
        """Pad captions of unequal lengths on the right into one batch of at least one token.

        Args:
            captions: One [T_i, W] tensor per caption, all of one dtype; T_i may be 0.
            prefix: [P, W].

        Returns:
            States of shape [B, max T_i, W] with their mask.
        """
        lengths = torch.tensor([len(caption) for caption in captions])
        states = pad_sequence(list(captions), batch_first=True)  # [B, T, W]
        mask = torch.arange(states.shape[1])[None, :] < lengths[:, None]  # [B, T]
        batch = cls(states, mask.to(states.device), prefix)
        # attention needs a place, be it a masked one
        return batch if states.shape[1] else batch.pad_to(1)

    def rounded(self, multiple: int) -> TextStates:
        """Pad to a whole multiple of `multiple` tokens, so that batches have few lengths.

        Args:
            multiple: Tokens; 1 changes nothing.

        Returns:
            States of shape [B, T, W], T a multiple.
        """
        tokens = self.states.shape[1]
        longer = -(-tokens // multiple) * multiple
        return self if longer == tokens else self.pad_to(longer)

    def to(self, device: torch.device | str) -> TextStates:
        """Copy to a device; the dtype stays, because the conditioner normalises in float32.

        Args:
            device: Where to.

        Returns:
            The same states on `device`.
        """
        return TextStates(
            self.states.to(device, non_blocking=True),
            self.mask.to(device, non_blocking=True),
            self.prefix.to(device, non_blocking=True),
            None if self.size is None else self.size.to(device, non_blocking=True),
        )

    def rows(self, cut: slice) -> TextStates:
        """Some of the captions.

        Args:
            cut: Which of the B rows.

        Returns:
            These captions, padded as they were.
        """
        return replace(
            self,
            states=self.states[cut],
            mask=self.mask[cut],
            size=None if self.size is None else self.size[cut],
        )

    def stack(self, other: TextStates) -> TextStates:
        """Put two batches into one, such as the two halves of a guided batch.

        Args:
            other: Captions of the same encoder.

        Returns:
            The rows of both, padded to the longer of the two, with the prefix of this batch.

        Raises:
            ValueError: One of them is coded, the other is not.
        """
        if (self.size is None) != (other.size is None):
            raise ValueError("coded states and others do not fit into one batch")
        tokens = max(self.states.shape[1], other.states.shape[1])
        first, second = self.pad_to(tokens), other.pad_to(tokens)
        return TextStates(
            torch.cat([first.states, second.states]),  # of two dtypes the wider one is taken
            torch.cat([first.mask, second.mask]),
            self.prefix,
            None
            if first.size is None or second.size is None
            else torch.cat([first.size, second.size]),
        )

    def pad_to(self, tokens: int) -> TextStates:
        """Lengthen every row with padding.

        Args:
            tokens: Length afterwards, at least the present one.

        Returns:
            States of shape [B, tokens, W].
        """
        missing = tokens - self.states.shape[1]
        pad = torch.nn.functional.pad
        return replace(
            self,
            states=pad(self.states, (0, 0, 0, missing)),
            mask=pad(self.mask, (0, missing)),
            size=None if self.size is None else pad(self.size, (0, missing)),
        )


@dataclass(frozen=True)
class PromptCondition:
    """`tokens` [B, S, D] refined caption tokens of all encoders, `mask` bool [B, S], `pooled`
    [B, D] their mean.

    `of_blocks` [B, K, S, D]: the tokens that each transformer block reads, where they differ.
    rows: each sample's place among them, long, where samples share captions: what depends on the
    caption alone, such as its keys and values in every block, is then computed once. None: one
    sample each.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor
    of_blocks: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def of_block(self, number: int) -> torch.Tensor:
        """What the transformer's block `number` reads, [B, S, D]."""
        return self.tokens if self.of_blocks is None else self.of_blocks[:, number]

    def take(self, rows: torch.Tensor | slice) -> PromptCondition:
        """Row `rows[i]` for sample i, copied; `rows` long, of any length, or a slice."""
        of_blocks = None if self.of_blocks is None else self.of_blocks[rows]
        return PromptCondition(self.tokens[rows], self.mask[rows], self.pooled[rows], of_blocks)

    @classmethod
    def join(cls, parts: Sequence[PromptCondition]) -> PromptCondition:
        """The rows of all parts, padded with masked tokens to the longest."""
        longest = max(part.tokens.shape[1] for part in parts)
        padded = [part.pad_to(longest) for part in parts]
        # all parts have them, or none
        of_blocks = [part.of_blocks for part in padded if part.of_blocks is not None]
        return cls(
            torch.cat([part.tokens for part in padded]),
            torch.cat([part.mask for part in padded]),
            torch.cat([part.pooled for part in padded]),
            torch.cat(of_blocks) if of_blocks else None,
        )

    def pad_to(self, tokens: int) -> PromptCondition:
        """Lengthen every row to S = `tokens` with masked tokens."""
        more = tokens - self.tokens.shape[1]
        pad = torch.nn.functional.pad
        of_blocks = None if self.of_blocks is None else pad(self.of_blocks, (0, 0, 0, more))
        return PromptCondition(
            pad(self.tokens, (0, 0, 0, more)), pad(self.mask, (0, more)), self.pooled, of_blocks
        )

    def shared(self, rows: torch.Tensor) -> PromptCondition:
        """The same without a copy: samples that share a row share what is computed of it."""
        return replace(self, rows=rows)


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the True tokens of [B, T, D] -> [B, D], at least float32; zero where a row has
    none.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    total = (tokens * mask[..., None]).sum(1, dtype=dtype)
    return total / mask.sum(1, keepdim=True).clamp_min(1)


def attendable(mask: torch.Tensor) -> torch.Tensor:
    """Key mask [B, T] with at least one True per row.

    A softmax over nothing is NaN. Rows without any token get their first position, which holds
    zeros.
    """
    first = torch.zeros_like(mask)
    first[:, 0] = True
    return mask | (first & ~mask.any(1, keepdim=True))
