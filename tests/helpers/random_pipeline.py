"""A pipeline of random weights in memory, with the states of random captions: no LLM, no files,
milliseconds.
"""

import torch

from lidit.config import EncoderSettings, ModelSettings
from lidit.models import LIDiT
from lidit.pipeline import LIDiTPipeline
from lidit.pipeline.model_encoder import ModelEncoder

WIDTHS = {"first": 12, "second": 20}


def random_pipeline(kind: str, seed: int = 0, guidance_input: bool = False) -> LIDiTPipeline:
    """A model of objective `kind` for images of 16 pixels, of whom no prediction is zero."""
    torch.manual_seed(seed)
    shape = {"width": 16, "depth": 1, "heads": 2, "patch_size": 4, "refiner": {"depth": 1}}
    model = LIDiT.from_settings(ModelSettings.model_validate(shape), WIDTHS, 3).eval()
    if guidance_input:
        config = {name: value for name, value in model.config.items() if not name.startswith("_")}
        model = LIDiT(**{**config, "guidance_input": True}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pipeline = LIDiTPipeline(
        model,
        objective={"kind": kind},
        sampler={"steps": 4, "guidance_scale": 2.0},
        height=16,
        width=16,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.encoders = {name: _encoder(name, width) for name, width in WIDTHS.items()}
    return pipeline


def random_states(tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """What a prompt of so many tokens might give."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tokens + place, width, generator=generator)
            for place, (name, width) in enumerate(WIDTHS.items())}  # fmt: skip


def _encoder(name: str, width: int) -> ModelEncoder:
    generator = torch.Generator().manual_seed(width)
    prefix, empty = (
        torch.randn(3, width, generator=generator),
        torch.randn(1, width, generator=generator),
    )
    settings = EncoderSettings(name=name, model="nowhere")
    return ModelEncoder(
        settings, {}, f"fingerprint of {name}", prefix, empty, torch.zeros(width), torch.ones(width)
    )
