"""An encoder beside the untouched model that it is made of."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel

from lidit.config import EncoderSettings
from lidit.text import PromptEncoder, resolve_encoder

Make = Callable[..., EncoderSettings]
CAPTIONS = [
    "a red circle",
    "x",
    "two yellow triangles left of a large white star, photographed in the evening light",
]


def load(settings: EncoderSettings) -> PromptEncoder:
    return PromptEncoder.load(resolve_encoder(settings, "cpu"), "cpu")


def whole(folder: Path, ids: list[int]) -> tuple[torch.Tensor, ...]:
    """Every layer's states [T, W] of the untouched model, run on one sequence alone."""
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return tuple(
            state[0]
            for state in model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        )


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm()) < 1e-5
