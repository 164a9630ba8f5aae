"""What a plan is about: sizes that were measured from a corpus and its encoders, or assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lidit.config import EncoderShape, ModelSettings
from lidit.models import LIDiT


@dataclass(frozen=True)
class PlannedEncoder:
    """An LLM of `shape` of which `blocks` run. `width`: of a stored token, `layers` of which are
    kept apart; `pooled`: of a caption's own vector.
    """

    shape: EncoderShape
    blocks: int
    width: int
    layers: int = 1
    pooled: int = 0


@dataclass(frozen=True)
class Facts:
    """What a plan is about, measured from a corpus or assumed in the recipe.

    `caption_tokens`, `prefix_tokens`: mean per caption, and once per encoder. `latent`: (channels,
    height, width).
    `repeated`: share of the captions that an earlier unit holds, too.
    """

    samples: int
    captions: int
    caption_tokens: Mapping[str, float]
    prefix_tokens: Mapping[str, int]
    encoders: Mapping[str, PlannedEncoder]
    latent: tuple[int, int, int]
    latent_storage: str
    posterior: bool
    # per value, of encoders whose coded states are there
    coded_bits: Mapping[str, float] = field(default_factory=dict)
    repeated: float | None = None

    def __post_init__(self) -> None:
        if self.captions < self.samples or min(self.samples, *self.latent) < 1:
            raise ValueError(
                f"a plan needs samples with at least one caption each and latents: {self}"
            )


def build_on_meta(settings: ModelSettings, facts: Facts) -> LIDiT:
    """The model without its numbers."""
    with torch.device("meta"):
        widths = {name: encoder.width for name, encoder in facts.encoders.items()}
        layers = {name: encoder.layers for name, encoder in facts.encoders.items()}
        return LIDiT.from_settings(settings, widths, facts.latent[0], layers)
