"""The loss of a LI-DiT model under given captions, in the form `binding` measures it.

Shapes: B batch, C latent channels, H x W latent size, T caption tokens, P prefix tokens, W width of
an LLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lidit.diffusion import Objective
from lidit.models import LIDiT, TextStates
from lidit.pipeline import LIDiTPipeline

CAPTIONS_AT_ONCE = 64
Rows = dict[str, dict[str, Tensor]]  # encoder -> caption -> states [T, W]


class CaptionLoss:
    """(latents [B, C, H, W], captions, timesteps [B], noise) -> loss [B], float32.

    rows: encoder -> caption -> states [T, W], for every caption that will be asked for. prefixes:
    encoder -> [P, W].
    """

    def __init__(
        self,
        model: LIDiT,
        objective: Objective,
        rows: Mapping[str, Mapping[str, Tensor]],
        prefixes: Mapping[str, Tensor],
    ) -> None:
        self.model, self.objective, self.rows, self.prefixes = model, objective, rows, prefixes
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def __call__(
        self, latents: Tensor, captions: list[str], timesteps: Tensor, noise: Tensor
    ) -> Tensor:
        latents, timesteps, noise = (
            tensor.to(self.device) for tensor in (latents, timesteps, noise)
        )
        text = {
            name: TextStates.collate(
                [rows[caption] for caption in captions], self.prefixes[name]
            ).to(self.device)
            for name, rows in self.rows.items()
        }
        noisy = self.objective.add_noise(latents, noise, timesteps)
        prediction = self.model(noisy.to(self.dtype), timesteps, text)
        return self.objective.loss(prediction, latents, noise, timesteps, noisy)


def caption_rows(pipe: LIDiTPipeline, captions: Sequence[str]) -> Rows:
    """States of every distinct caption by the pipeline's own LLMs, rounded as training saw them."""
    distinct = list(dict.fromkeys(captions))
    device = str(pipe.device)
    found: Rows = {}
    for name, encoder in pipe.encoders.items():
        rows: dict[str, Tensor] = {}
        for start in range(0, len(distinct), CAPTIONS_AT_ONCE):
            part = distinct[start : start + CAPTIONS_AT_ONCE]
            rows |= dict(zip(part, encoder.encode(part, device), strict=True))
        found[name] = rows
    return found


def pipeline_loss(pipe: LIDiTPipeline, captions: Sequence[str]) -> CaptionLoss:
    """The loss of a loaded model for these captions, each encoded once."""
    prefixes = {name: encoder.prefix for name, encoder in pipe.encoders.items()}
    return CaptionLoss(pipe.model, pipe.objective, caption_rows(pipe, captions), prefixes)


def pipeline_latents(pipe: LIDiTPipeline, images: Tensor) -> Tensor:
    """Images [B, 3, height, width] in [-1, 1] as the model sees them: the codec's mean latents
    [B, C, H, W].
    """
    parts = [
        pipe.codec.encode(part.to(pipe.device)).mean.cpu()
        for part in images.split(CAPTIONS_AT_ONCE)
    ]
    return torch.cat(parts)
