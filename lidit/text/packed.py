"""Captions without padding: their tokens in one row, behind an instruction whose keys and values
lie in one place.

A padded batch copies the instruction's keys and values for every caption in every block, and its
rectangles are small
where captions are short: on an H100 copies took a fifth of the kernels' time, and the GPU waited a
quarter of its own. Here attention has two parts, over a caption's own tokens and over the
instruction, joined by their log-sum-exps.

Legend: N tokens of all captions, P context tokens, H heads, G heads of keys and values, E width of
a head.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

ATTENTION = "lidit-packed"  # transformers' name for `packed_attention`
# What a model may ask of attention beyond causality; the two parts here know nothing of it.
UNKNOWN_HERE = ("softcap", "s_aux", "position_bias", "head_mask", "score_mod")


@dataclass(frozen=True)
class Packing:
    """One batch: where its captions lie, and the blocks' keys and values of the context before
    them.
    """

    bounds: torch.Tensor  # int32 [captions + 1], the first token of each caption, then N
    longest: int
    context: Any  # transformers' cache after the context
    context_tokens: int

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        longest: int,
        context: Any,
        context_tokens: int,
        device: torch.device,
    ) -> Packing:
        """`lengths` of the captions; `longest` of any caption that is to come."""
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(
            bounds.to(device, non_blocking=True), max(longest, *lengths), context, context_tokens
        )

    def positions(self, lengths: Sequence[int]) -> torch.Tensor:
        """Each token's position [1, N] in its own sequence, context included."""
        counts = torch.tensor(lengths)
        starts = torch.tensor([0, *accumulate(lengths)][:-1]).repeat_interleave(counts)  # [N]
        return (torch.arange(int(counts.sum())) - starts + self.context_tokens)[None].to(
            self.bounds.device
        )


_running: ContextVar[Packing] = ContextVar("the batch whose attention is computed")


@contextlib.contextmanager
def packed(model: Any, packing: Packing) -> Iterator[None]:
    """Attention of `model` is that of `packing` meanwhile."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
    before, token = model.config._attn_implementation, _running.set(packing)
    model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _running.reset(token)


def packed_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """[1, H, N, E], [1, G, N, E] twice -> [1, N, H, E]; transformers calls it in every block.

    NotImplementedError for attention of another kind, such as over a window shorter than the
    sequences.
    """
    packing = _running.get()
    window = options.get("sliding_window")
    if window is not None and window < packing.context_tokens + packing.longest:
        raise NotImplementedError(f"a window of {window} tokens")
    if attention_mask is not None or any(options.get(name) is not None for name in UNKNOWN_HERE):
        raise NotImplementedError("attention with a mask or a bias of its own")
    layer = packing.context.layers[module.layer_idx]
    if layer.keys is None or layer.keys.shape[-2] != packing.context_tokens:
        raise NotImplementedError("a block without keys of the whole context")
    # [N, H or G, E]
    query, key, value = (tokens[0].transpose(0, 1) for tokens in (query, key, value))
    # [P, G, E]
    before, worth = (tokens[0].transpose(0, 1) for tokens in (layer.keys, layer.values))

    own, own_sum = _attend(query, key, value, packing.bounds, packing.longest, scaling)
    shared, shared_sum = _attend(query, before, worth, None, len(query), scaling)
    # Softmax over both: each part counts as much as its share of the sum of exponentials.
    share = torch.sigmoid(shared_sum - own_sum).transpose(0, 1)[..., None]  # [N, H, 1]
    return torch.lerp(own.float(), shared.float(), share).to(own.dtype)[None], None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor | None,
    longest: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output [N, H, E] and log-sum-exp float32 [H, N]: causal within `bounds`, or of every query
    over all keys.
    """
    if not query.is_cuda:
        return _attend_plainly(query, key, value, bounds, scale)
    from torch.nn.attention import varlen

    window, of_query, of_key, most = (-1, 0), bounds, bounds, longest
    if bounds is None:
        window, most = (-1, -1), len(key)
        of_query, of_key = (
            torch.tensor([0, n], dtype=torch.int32, device=query.device) for n in (longest, most)
        )
    # The kernel has always read grouped heads; newer versions of torch want to be told.
    attend: Any = varlen.varlen_attn
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(attend).parameters else {}
    output, total = attend(
        query, key, value, of_query, of_key, longest, most,
        return_aux=varlen.AuxRequest(lse=True), scale=scale, window_size=window, **grouped,
    )  # fmt: skip
    return output, total


def _attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same written out, for devices without such a kernel: every query against every key."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tokens.repeat_interleave(groups, dim=1) for tokens in (key, value))  # [S, H, E]
    scores = torch.einsum("nhe,she->hns", query.float(), key.float())
    scores *= query.shape[-1] ** -0.5 if scale is None else scale
    if bounds is not None:
        number = torch.arange(len(query), device=query.device)
        caption = torch.bucketize(number, bounds, right=True)  # [N]
        visible = (caption[:, None] == caption) & (number[:, None] >= number)  # [N, N]
        scores = scores.masked_fill(~visible, -torch.inf)
    output = torch.einsum("hns,she->nhe", scores.softmax(-1), value.float())
    return output.to(query.dtype), scores.logsumexp(-1)
