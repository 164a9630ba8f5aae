"""Several layers of an LLM become one state per token, or one for each transformer block.

Which layer knows what differs by word and by model, so the average is taken over layers that count
alike, or by weights
that are learned: one set for the model, or one more for each of its blocks (depth-wise routing,
arXiv 2602.03510).

Shapes: L layers, W width of an LLM or of the transformer, R averages of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from lidit.errors import InputError

Layers = Literal["one", "mean", "learned", "per_block"]


class LayerMixture(nn.Module):
    """Weighted averages over layers, [..., L, W] -> [..., R, W]; the weights of each average sum to
    1.

    `mean` has one average and no weights of its own, `learned` one; `per_block` has the refiners'
    first and one for each of `blocks` behind it. All layers weigh the same at the start.
    """

    def __init__(self, layers: int, kind: Layers, blocks: int) -> None:
        super().__init__()
        self.averages = 1 + (blocks if kind == "per_block" else 0)
        self.scores = None if kind == "mean" else nn.Parameter(torch.zeros(self.averages, layers))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.scores is None:
            return states.mean(-2, keepdim=True)
        # In bfloat16 a dozen weights would not sum to 1.
        exact = torch.promote_types(states.dtype, torch.float32)
        return (self.scores.to(exact).softmax(-1) @ states.to(exact)).to(states.dtype)


def check_layers(kind: Layers, stored: Mapping[str, int]) -> None:
    """InputError unless `kind` can read encoders that keep so many layers of a token apart."""
    several = [name for name, count in sorted(stored.items()) if count > 1]
    if kind == "one" and several:
        raise InputError(
            f"model.layers: 'one' reads one state per token, but encoder {several[0]} keeps "
            f"{stored[several[0]]} "
            "layers apart; set mean, learned or per_block, or embed with join: concatenate"
        )
    if kind != "one" and not several:
        raise InputError(
            f"model.layers: {kind!r} needs several layers of a token, but "
            f"{', '.join(sorted(stored))} keep one; give "
            "an encoder layers and join: separate"
        )
