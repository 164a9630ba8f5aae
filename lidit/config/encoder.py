"""Settings of one prompt encoder: a section of a recipe, or a file of its own."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field, field_validator

from lidit.config.fields import Place
from lidit.config.settings import Settings

PAPER_INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "and spatial relationships of the objects:"
)


class EncoderSettings(Settings):
    """Everything that determines the states of one LLM, except the digests of its files (paper 3.1)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="name of the text family")
    model: Place = Field(description="hub id, folder, or package:NAME")
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$", description="commit of a hub id")
    kind: Literal["causal", "unmasked", "encoder"] = "causal"
    layer: int = Field(-3, description="block whose output is stored; negative counts from the last block (-1)")
    system_prompt: str = Field("", description="put before the instruction")
    instruction: str | None = Field(None, description="None: the paper's for language models, none for kind encoder")
    chat_template: bool = Field(False, description="wrap system prompt and instruction in the model's chat template")
    template_date: str | None = Field(
        None, pattern=r"^\d{4}-\d\d-\d\d$", description="YYYY-MM-DD, for chat templates that print today's date"
    )
    max_tokens: int = Field(256, ge=1, description="caption tokens kept; longer captions are cut and counted")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPU, float32 on CPU")
    storage: Literal["compute", "float32", "bfloat16", "int8"] = Field("bfloat16", description="dtype on disk")

    @field_validator("template_date")
    @classmethod
    def _is_a_day(cls, value: str | None) -> str | None:
        if value is not None:
            date.fromisoformat(value)  # ValueError for what the calendar lacks
        return value
