"""Settings of `lidit tune-sampler`: which samplers are tried on a model, on what, and how much that
may cost.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lidit.config.fields import Fraction, Place, Seed
from lidit.config.settings import Settings


class TuneSettings(Settings):
    """Every combination is a candidate; rounds of prompts tell the bad ones early."""

    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((2, 4, 6, 8, 12, 16, 25), min_length=1)
    schedulers: tuple[Literal["auto", "ddim", "dpm_solver", "euler"], ...] = Field(
        ("auto", "dpm_solver"), min_length=1
    )
    guidance_scales: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (1.0, 1.5, 2.0, 3.0, 4.0), min_length=1
    )
    guidance_intervals: tuple[tuple[Fraction, Fraction], ...] = Field(
        ((0.0, 1.0), (0.25, 1.0), (0.0, 0.75)), min_length=1
    )
    evaluations: int = Field(
        200_000, ge=1, description="the budget: evaluations of the network, one picture each"
    )
    per_round: int = Field(
        4, ge=1, description="prompts per category in a round; of captions, in all"
    )
    rounds: int = Field(6, ge=1)
    margin: Fraction = Field(
        0.03,
        description="the recommended sampler is the cheapest whose score is, with 95 % certainty, "
        "less than the best one's by no more than this",
    )
    captions: Place | None = Field(
        None,
        description="text file, a caption per line: judged by the model's own losses in place of "
        "the scene scorer",
    )
    layout: Literal["simple", "free"] = "simple"
    tags: tuple[str, ...] = ()
    seed: Seed = Field(
        2, description="of the prompts; lidit evaluate's own is 1, so that its prompts stay unseen"
    )
    batch_size: int = Field(64, ge=1)
