"""How a public pipeline takes prompt states, and facts of a model: beside an encoder, not part of
its identity.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lidit.config.settings import Settings


class ConditionSettings(Settings):
    """The arguments of a diffusers pipeline's call that hold these states."""

    pipeline: str = Field(description="class of diffusers")
    states: str | None = Field(
        "prompt_embeds", description="argument for the states; None where only pooled is taken"
    )
    mask: str | None = Field(
        None, description="argument for the mask; None: the pipeline takes none"
    )
    pooled: str | None = Field(None, description="argument for the pooled vectors")
    pooled_as_token: bool = Field(
        False, description="whether a pooled vector is a row of one token: [rows, 1, width]"
    )
    mask_dtype: Literal["int64", "bool", "states"] = "int64"
    mask_if_full: bool = Field(True, description="whether a mask without any padding is given")
    instruction: int | Literal["all"] = Field(
        0,
        description="how many of the instruction's states stand before the caption's: the "
        "first, or -N: the last",
    )
    layout: Literal["batch", "list", "layers_first"] = Field(
        "batch",
        description="[rows, tokens, ...], a list of [tokens, ...], or [layers, rows, tokens, "
        "width]",
    )
    side: Literal["right", "left"] = Field("right", description="where zeros fill a batch up")
    bundles: int = Field(
        1, ge=1, description="groups of layers that stand apart: [rows, bundles, tokens, ...]"
    )


class ModelFacts(Settings):
    """What the public model is, for a list of encoders; nothing is computed from it."""

    system: str = Field(description="the public system whose states these are")
    width: int = Field(ge=1, description="of the model's states")
    blocks: int = Field(ge=1)
    licence: str = Field(description="of the model's weights")
