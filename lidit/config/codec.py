"""Settings of `lidit train-codec`: an autoencoder of one's own images."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from lidit.config import LoopSettings, RunRecipe
from lidit.config.fields import Place, Seed
from lidit.config.settings import Settings


class CodecModelSettings(Settings):
    """The shape of diffusers' AutoencoderKL; the default is the paper's: 8x, 16 channels."""

    block_out_channels: tuple[Annotated[int, Field(ge=4)], ...] = Field(
        (128, 256, 512, 512), min_length=1, description="each block after the first halves the side"
    )
    layers_per_block: int = Field(2, ge=1)
    latent_channels: int = Field(16, ge=1)
    norm_groups: int = Field(32, ge=1)
    middle_attention: bool = True

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        for channels in self.block_out_channels:
            if channels % self.norm_groups:
                raise ValueError(
                    f"norm_groups: {self.norm_groups} does not divide the {channels} "
                    "channels of a block"
                )
        return self

    @property
    def factor(self) -> int:
        """Pixels per latent position."""
        return int(2 ** (len(self.block_out_channels) - 1))


class CodecLossSettings(Settings):
    """Reconstruction L1 + kl_weight x KL + perceptual_weight x the distance in a network's
    features.
    """

    kl_weight: float = Field(1e-6, ge=0, description="per latent value, against L1 per pixel value")
    perceptual_weight: float = Field(0.0, ge=0)
    perceptual_model: Place | None = Field(
        None, description="hub id or folder of a vision network of transformers"
    )
    perceptual_revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")

    @model_validator(mode="after")
    def _network_given(self) -> Self:
        if (self.perceptual_weight > 0) != (self.perceptual_model is not None):
            raise ValueError("perceptual_weight and perceptual_model: give both or neither")
        return self


class CodecDataSettings(Settings):
    seed: Seed = 0
    window_units: int = Field(16, ge=1, description="units shuffled together")
    prefetch_batches: int = Field(4, ge=0)
    validation_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of images kept for PSNR and grids"
    )
    scale: int = Field(1, ge=1, le=8, description="buckets of the corpus times this")


class CodecTrainSettings(LoopSettings):
    """`validate_every` 0: reconstructions and PSNR at the end only."""

    grid_images: int = Field(12, ge=1, description="held-out images in the grids")


class CodecRecipe(RunRecipe):
    """One training run of a codec."""

    model: CodecModelSettings = CodecModelSettings()
    loss: CodecLossSettings = CodecLossSettings()
    data: CodecDataSettings = CodecDataSettings()
    train: CodecTrainSettings = CodecTrainSettings()
