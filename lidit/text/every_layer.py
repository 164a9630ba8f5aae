"""The states of every block of an LLM at once, for looking into them; embedding needs one block
only.

Legend: L blocks, B captions of one length, T tokens of a caption, P prefix tokens, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lidit.text.encoder import PromptEncoder
from lidit.text.loading import block_list


def every_layer(
    encoder: PromptEncoder, token_ids: Sequence[Sequence[int]], token_budget: int = 2048
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Batches of captions of one length: their rows in `token_ids`, and states [L, B, T, W] on the
    CPU, float32.

    Block l of the result is the raw output of block l + 1; the encoder must have been loaded with
    all blocks (layer -1). Captions stand behind the encoder's own prefix, as in embedding.
    """
    lengths: dict[int, list[int]] = {}
    for row, ids in enumerate(token_ids):
        lengths.setdefault(len(ids), []).append(row)
    with _outputs(encoder) as outputs:
        for length, rows in sorted(lengths.items()):
            size = max(1, token_budget // length)
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                # captions of one length are one batch without padding, so the blocks ran once, in
                # the order of `part`
                list(encoder.encode_tokens([token_ids[row] for row in part], token_budget))
                states = torch.stack([output[:, -length:] for output in outputs])  # [L, B, T, W]
                outputs.clear()
                yield part, states


def prefix_layers(encoder: PromptEncoder) -> torch.Tensor | None:
    """States [L, P, W] of what stands before a caption under a causal mask, float32; None where it
    sees the caption.
    """
    if encoder.spec.kind != "causal":
        return None
    with _outputs(encoder) as outputs:
        encoder.trunk.read_context(
            torch.tensor([encoder.tokenizer.context_ids], device=encoder.trunk.device)
        )
        return torch.stack([output[0] for output in outputs])


@contextmanager
def _outputs(encoder: PromptEncoder) -> Iterator[list[torch.Tensor]]:
    """Each block's output [B, P + T, W] or [B, T, W], appended when it has run."""
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).float().cpu())

    blocks = block_list(encoder.trunk.model, encoder.spec.blocks)
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
