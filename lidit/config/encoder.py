"""Settings of one prompt encoder: a section of a recipe, or a file of its own."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lidit.config.condition import ConditionSettings, ModelFacts
from lidit.config.fields import Place
from lidit.config.settings import Settings

PAPER_INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "and spatial relationships of the objects:"
)
CAPTION = "{}"  # where the caption stands in a template
Cleaning = Literal[
    "strip", "lower", "whitespace", "unescape", "no_image_mark", "space_if_empty", "glyphs"
]


class PaddingSettings(Settings):
    """Padding whose states a system conditions on: it is computed and stored like a caption's
    tokens.

    Without this section padding is never stored, and no state depends on it.
    """

    multiple_of: int | None = Field(
        None, ge=1, description="None: up to max_tokens, counted as they are"
    )
    side: Literal["right", "left"] = Field(
        "right", description="left: before everything, the instruction too"
    )
    masked: bool = Field(False, description="whether no token attends to padding")
    token: Literal["pad", "eos"] | Annotated[int, Field(ge=0)] = Field(
        "pad", description="which of the tokenizer's tokens it is made of, or the id of one"
    )
    position: int | None = Field(
        None, ge=0, description="of each of its tokens; None: positions go on behind the text"
    )

    @model_validator(mode="after")
    def _positions_are_behind_text(self) -> PaddingSettings:
        if self.position is not None and (self.side == "left" or not self.masked):
            raise ValueError("position is for padding on the right that is masked")
        return self


class EncoderSettings(Settings):
    """Everything that determines the states of one LLM, except the digests of its files (paper
    3.1).
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="name of the text family")
    model: Place = Field(description="hub id, folder, or package:NAME")
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$", description="commit of a hub id")
    kind: Literal["causal", "unmasked", "encoder"] = "causal"
    layer: int = Field(
        -3, description="block whose output is stored; negative counts from the last block (-1)"
    )
    layers: tuple[int, ...] | Literal["all", "all with embeddings"] | None = Field(
        None, description="instead of layer: several blocks of one pass, 0 for the embeddings"
    )
    join: Literal["concatenate", "interleave", "separate", "mean"] = Field(
        "concatenate",
        description="of layers; a token's channels are layer by layer, or interleaved channel by "
        "channel",
    )
    normalise: Literal["standard", "rms"] | None = Field(
        None, description="each of the layers over its width, before they are joined"
    )
    final_norm: bool = Field(
        True, description="whether the last block's output passes the model's final norm"
    )
    pooled: Literal["pooler_output", "text_embeds"] | None = Field(
        None, description="a caption's vector, as CLIP's"
    )
    system_prompt: str = Field("", description="put before the instruction")
    instruction: str | None = Field(
        None, description="None: the paper's for language models, none for kind encoder"
    )
    chat_template: bool = Field(
        False, description="wrap system prompt and instruction in the model's chat template"
    )
    template_date: str | None = Field(
        None,
        pattern=r"^\d{4}-\d\d-\d\d$",
        description="YYYY-MM-DD, for chat templates that print today's date",
    )
    template: str | None = Field(
        None, description="the whole text, with {} for the caption; instead of instruction"
    )
    suffix: Literal["kept", "dropped"] | None = Field(
        None,
        description="read the template's tokens behind the caption too, with or without storing "
        "their states",
    )
    generation_prompt: bool = Field(
        False, description="whether the suffix of a chat template begins the answer"
    )
    thinking: bool | None = Field(
        None, description="enable_thinking of a chat template that asks for it"
    )
    clean: tuple[Cleaning, ...] = Field(
        (), description="what is done to a caption's text, in this order"
    )
    spell_quoted: bool = Field(
        False, description="text in quotation marks is tokenised character by character"
    )
    empty: int | Literal["bos", "nothing"] | None = Field(
        None,
        description="token of a caption without any; None: end of text, or nothing before a suffix "
        "that is kept",
    )
    max_tokens: int = Field(
        256, ge=1, description="caption tokens kept; longer captions are cut and counted"
    )
    counted: Literal["caption", "with_suffix", "whole"] = Field(
        "caption", description="what max_tokens counts"
    )
    padding: PaddingSettings | None = Field(
        None, description="for systems that condition on padding"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPU, float32 on CPU"
    )
    storage: Literal["compute", "float32", "bfloat16", "int8", "int4", "coded"] = Field(
        "bfloat16", description="dtype on disk; coded: whole steps, entropy coded"
    )
    storage_error: float | None = Field(
        None,
        ge=0.03,
        le=0.5,
        description="of storage coded: rms in a channel's deviations; None: 0.1",
    )
    condition: ConditionSettings | None = Field(
        None, description="what a public pipeline calls these states"
    )
    facts: ModelFacts | None = Field(None, description="of the model, for lists of encoders")

    @field_validator("template_date")
    @classmethod
    def _is_a_day(cls, value: str | None) -> str | None:
        if value is not None:
            date.fromisoformat(value)  # ValueError for what the calendar lacks
        return value

    @field_validator("template")
    @classmethod
    def _has_one_caption(cls, value: str | None) -> str | None:
        if value is not None and value.count(CAPTION) != 1:
            raise ValueError("the caption stands in a template exactly once, as {}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> EncoderSettings:
        """Settings that exclude or need each other; every message names what to change."""
        if self.layers is not None and self.layer != -3:
            raise ValueError("layer and layers: give one of them")
        if self.layers is None and (self.normalise is not None or self.join != "concatenate"):
            raise ValueError("join and normalise are of several layers: set layers")
        if self.layers == ():
            raise ValueError("layers: name one at least")
        if self.join == "mean" and self.normalise is None:
            raise ValueError(
                "join: mean of layers as they are is the last one's, whose states are largest; "
                "set normalise"
            )
        if self.template is not None and (
            self.chat_template or self.instruction or self.system_prompt
        ):
            raise ValueError(
                "template is the whole text: leave chat_template, system_prompt and instruction out"
            )
        if self.suffix is not None and not self.chat_template and self.template is None:
            raise ValueError(
                "suffix: only a template has one: set template, or chat_template: true"
            )
        if self.generation_prompt and not (self.chat_template and self.suffix):
            raise ValueError(
                "generation_prompt is part of a chat template's suffix: set chat_template "
                "and suffix"
            )
        if self.thinking is not None and not self.chat_template:
            raise ValueError("thinking is asked of chat templates: set chat_template: true")
        behind = (self.template or "").partition(CAPTION)[2]
        if behind and self.suffix is None:
            raise ValueError(
                "the template goes on behind the caption: set suffix: kept, or dropped"
            )
        if self.kind == "encoder" and self.template not in (None, CAPTION):
            raise ValueError("kind encoder reads the bare caption: leave template out")
        if self.padding is not None and self.suffix == "dropped":
            raise ValueError("padding stands behind the suffix: set suffix: kept, or leave it out")
        if self.pooled is not None and self.kind != "encoder":
            raise ValueError("pooled vectors are given by text encoders: set kind: encoder")
        if self.storage_error is not None and self.storage != "coded":
            raise ValueError(
                "storage_error: only storage: coded keeps to an error that is asked for"
            )
        if self.kind == "unmasked" and self.padding is not None:
            raise ValueError("padding is for the kinds causal and encoder")
        if self.padding is not None and self.padding.position is not None and self.kind != "causal":
            raise ValueError("padding.position is for kind: causal")
        return self

    @property
    def keeps_layers_apart(self) -> bool:
        """Whether a token's state is several layers, each with a place of its own."""
        # "all" is several
        return self.join == "separate" and self.layers is not None and len(self.layers) > 1
