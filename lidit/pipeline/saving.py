"""Writing the folder that people load: a trained network with its LLMs' states, settings and model
card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lidit.errors import InputError
from lidit.models import LIDiT
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.pipeline.pipeline import LIDiTPipeline
from lidit.pipeline.settings import PipelineSettings
from lidit.pipeline.sharing import CARD


def save_pipeline(
    folder: str | Path,
    model: LIDiT,
    encoders: Sequence[ModelEncoder],
    settings: PipelineSettings,
    facts: Mapping[str, Any],
) -> LIDiTPipeline:
    """Write the folder that `LIDiTPipeline.from_pretrained` reads, with a model card.

    Args:
        folder: the model folder to write.
        model: the network.
        encoders: one for each of the model's, see `ModelEncoder.of_family`.
        settings: how the model samples, and its training size.
        facts: what the card says of the run ("scores" as a table).

    Returns:
        The pipeline that was written.

    Raises:
        InputError: one of the model's encoders is missing.
    """
    named = {encoder.name: encoder for encoder in encoders}
    missing = [name for name in model.conditioner.names if name not in named]
    if missing:
        raise InputError(f"{folder}: no text family for the model's encoder {', '.join(missing)}")
    pipeline = LIDiTPipeline(
        model,
        objective=settings.objective.model_dump(mode="json"),
        sampler=settings.sampler.model_dump(mode="json"),
        codec=settings.codec.model_dump(mode="json"),
        height=settings.height,
        width=settings.width,
    )
    pipeline.encoders = {name: named[name] for name in model.conditioner.names}
    pipeline.save_pretrained(folder)
    (Path(folder) / CARD).write_text(pipeline.card(facts), encoding="utf-8")
    return pipeline
