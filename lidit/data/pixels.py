"""From a corpus's pixels to the tensors of a codec's training step.

Letters: B images of this worker's part of a global batch; C, h, w channels and sides of their
latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from lidit.data.order import GlobalBatch, shares
from lidit.data.rng import Purpose, draw, fill_gaussian
from lidit.data.rows import Rows
from lidit.store import LatentFamily


@dataclass(frozen=True)
class PixelBatch:
    step: int
    keys: tuple[str, ...]
    pixels: torch.Tensor  # [B, 3, H, W] float32 on [-1, 1]
    noise: torch.Tensor  # [B, C, h, w] float32, of the posterior

    @property
    def tokens(self) -> int:
        """Latent positions."""
        return self.noise.shape[0] * self.noise.shape[2] * self.noise.shape[3]

    def to(self, device: torch.device) -> PixelBatch:
        return replace(self, pixels=self.pixels.to(device), noise=self.noise.to(device))

    def split(self, parts: int) -> list[PixelBatch]:
        """Slices, in order, for gradient accumulation."""
        cuts = shares(len(self.keys), parts)
        return [
            PixelBatch(self.step, self.keys[cut], self.pixels[cut], self.noise[cut]) for cut in cuts
        ]


class PixelAssembler:
    """Reads a family of codec `pixels`; the noise depends on (seed, epoch, image) alone."""

    def __init__(
        self, pixels: LatentFamily, rows: Rows, seed: int, channels: int, factor: int
    ) -> None:
        self.pixels, self.rows, self.seed, self.channels, self.factor = (
            pixels,
            rows,
            seed,
            channels,
            factor,
        )

    def assemble(self, batch: GlobalBatch) -> PixelBatch:
        images: list[torch.Tensor] = [torch.empty(0)] * len(batch.row)
        keys = [""] * len(batch.row)
        for unit in np.unique(batch.unit).tolist():
            self.pixels.verify_unit(unit)
            places = np.flatnonzero(batch.unit == unit).tolist()
            members = batch.row[places].tolist()
            held = self.rows.unit(unit).keys
            for place, row, image in zip(
                places, members, self.pixels.read(unit, members), strict=True
            ):
                images[place], keys[place] = image, held[row]
        pixels = torch.stack(images)
        size, _, height, width = pixels.shape
        noise = torch.empty(size, self.channels, height // self.factor, width // self.factor)
        fill_gaussian(noise, draw(self.seed, Purpose.LATENT, batch.epoch, batch.unit, batch.row))
        return PixelBatch(batch.step, tuple(keys), pixels, noise)
