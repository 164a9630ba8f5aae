"""The model: its shape, what it learns to predict, and how it is sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lidit.config.fields import Fraction
from lidit.config.settings import Settings


class RefinerSettings(Settings):
    """Linguistic token refiner (paper 3.1; tables 2, 3 and 5)."""

    depth: int = Field(2, ge=0, description="blocks N; 0 leaves the refiner out")
    causal: bool = Field(False, description="keep the causal mask (table 3)")
    gated: bool = Field(True, description="adaptive gates, zero at start (table 5)")
    mixing: bool = Field(
        True, description="False: attention sees only the own token (parameter-matched control)"
    )


class FusionSettings(Settings):
    """How several LLMs become one text condition (paper 3.1; table 6)."""

    mode: Literal["none", "concatenation", "refiner"] = Field(
        "refiner",
        description="none: exactly one LLM; concatenation: along the sequence; refiner: "
        "collaborative",
    )
    depth: int = Field(1, ge=1)


class ModelSettings(Settings):
    """LI-DiT's shape. A preset fills width, depth, heads and patch size; single
    values override it.
    """

    preset: Literal["tiny", "S", "B", "L", "1B", "10B"] = "tiny"
    width: int | None = Field(None, ge=8)
    depth: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    patch_size: int | None = Field(None, ge=1)
    refiner: RefinerSettings = RefinerSettings()
    fusion: FusionSettings = FusionSettings()
    visible_tokens: int | None = Field(
        None,
        ge=1,
        description="the transformer sees the first N caption tokens only, the refiners all "
        "(control)",
    )
    layers: Literal["one", "mean", "learned", "per_block"] = Field(
        "one",
        description="how layers that an encoder keeps apart (join: separate) become one state per "
        "token",
    )
    activation_checkpointing: bool = False
    checkpointed_every: int | None = Field(
        None,
        ge=1,
        description="with activation_checkpointing, every k-th block of the transformer; None: "
        "each",
    )


class ObjectiveSettings(Settings):
    """What the network predicts and how the loss weighs it (paper appendix A.1 and two more)."""

    kind: Literal["ddpm", "rectified_flow", "clean"] = "ddpm"
    timesteps: Literal["uniform", "logit_normal"] | None = Field(
        None, description="None: uniform for ddpm, logit_normal for the others"
    )
    train_steps: int = Field(1000, ge=2, description="ddpm: discrete noise levels")


class SamplerSettings(Settings):
    steps: int = Field(25, ge=1)
    guidance_scale: float = Field(3.0, ge=0)
    guidance_interval: tuple[Fraction, Fraction] = Field(
        (0.0, 1.0), description="timesteps where guidance acts"
    )
    guidance_rescale: Fraction = 0.0
    scheduler: Literal["auto", "ddpm", "ddim", "dpm_solver", "euler"] = Field(
        "auto", description="auto: ddim for ddpm, euler for the others"
    )

    @model_validator(mode="after")
    def _interval(self) -> SamplerSettings:
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(
                f"guidance_interval: ({low:g}, {high:g}) is empty, so guidance would never act; "
                "swap the two"
            )
        return self
