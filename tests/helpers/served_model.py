"""A model folder that can be served: random weights, and two random LLMs that are really loaded.
Seconds to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lidit.config import (
    CodecSettings,
    EncoderSettings,
    ModelSettings,
    ObjectiveSettings,
    SamplerSettings,
)
from lidit.models import LIDiT
from lidit.pipeline import PipelineSettings, save_pipeline
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.store import channel_statistics
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers.tiny_models import tiny_llm

WORDS = ["a red cube on a blue sphere", "a circle", "a green square left of the red circle"]
LONGEST = 24  # tokens of a prompt


def small_model(folder: Path, side: int = 16) -> Path:
    """The folder of a model for pictures of `side` pixels."""
    encoders = [
        _encoder(
            EncoderSettings(
                name=name, model=str(tiny_llm(folder / name, family, 4, width)), max_tokens=LONGEST
            )
        )
        for name, family, width in (("llama", "llama", 32), ("qwen", "qwen2", 48))
    ]
    model = random_network(encoders)
    settings = PipelineSettings(
        ObjectiveSettings(kind="clean"),
        SamplerSettings(steps=4, guidance_scale=2.0),
        CodecSettings(),
        side,
        side,
    )
    save_pipeline(folder / "small" / "model", model, encoders, settings, {})
    return folder / "small" / "model"


def random_network(encoders: Sequence[ModelEncoder]) -> LIDiT:
    """A small network for these LLMs, every weight moved off its start, so that no
    gate is closed.
    """
    torch.manual_seed(0)
    shape = ModelSettings.model_validate({"width": 32, "depth": 2, "heads": 4, "patch_size": 4})
    model = LIDiT.from_settings(shape, {e.name: e.mean.shape[0] for e in encoders}, 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for encoder in encoders:
        model.conditioner.set_statistics(encoder.name, encoder.mean, encoder.deviation)
    return model


def _encoder(settings: EncoderSettings) -> ModelEncoder:
    """What training would hold of an LLM."""
    spec = resolve_encoder(settings)
    encoder = PromptEncoder.load(spec)
    mean, deviation = channel_statistics([caption.states for caption in encoder.encode(WORDS)])
    fixed = settings.model_copy(update={"dtype": spec.dtype, "storage": spec.storage})
    prefix, empty = encoder.prefix_states()[1], encoder.empty_states()[1]
    return ModelEncoder(fixed, spec.to_dict(), spec.fingerprint, prefix, empty, mean, deviation)
