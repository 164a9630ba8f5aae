"""A model folder as a training leaves it, of random weights: small, real, and made in a second."""

from __future__ import annotations

from pathlib import Path

import torch

from lidit.models import LIDiT
from lidit.pipeline import PipelineSettings, save_pipeline
from lidit.pipeline.checksums import CHECKSUMS
from lidit.pipeline.model_encoder import ModelEncoder
from tests.helpers.trained import SmallWorld

WEIGHTS = Path("model", "diffusion_pytorch_model.safetensors")  # in the model folder


def write_model(world: SmallWorld, folder: Path, seed: int) -> Path:
    """A model folder with random weights that draws something: its last layer is not zero as a
    fresh model's is.
    """
    recipe, corpus = world.recipe(folder), world.open()
    families = {encoder.name: corpus.text_family(encoder.name) for encoder in world.encoders}
    torch.manual_seed(seed)
    model = LIDiT.from_settings(
        recipe.model, {name: family.width for name, family in families.items()}, 3
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for name, family in families.items():
        model.conditioner.set_statistics(name, family.shared().mean, family.shared().deviation)
    encoders = [
        ModelEncoder.of_family(encoder, families[encoder.name]) for encoder in world.encoders
    ]
    settings = PipelineSettings(recipe.objective, recipe.sampler, recipe.codec, height=32, width=32)
    save_pipeline(folder / "model", model, encoders, settings, {})
    (folder / "model" / CHECKSUMS).unlink()  # tests change the folder by hand
    return folder / "model"
