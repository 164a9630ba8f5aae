"""Settings of what a model is aligned by: rewards of pictures, losses over pairs, adapters."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lidit.config.settings import Settings


class RewardSettings(Settings):
    """What a picture is worth, 0 to 1: a rule over its pixels, a function, or a model behind an
    address.
    """

    kind: Literal["scenes", "function", "vqa"] = Field(
        "scenes",
        description="scenes: the scene scorer; function: of your own; vqa: a model that is asked "
        "about it",
    )
    rule: Literal["strict", "partial"] = Field(
        "strict",
        description="scenes: right or wrong; partial: half of a wrong picture's clauses that are "
        "met",
    )
    layout: Literal["simple", "free"] = Field(
        "simple", description="scenes: the vocabulary of the corpus's scenes"
    )
    function: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="package.module:name, imported on the trainers",
    )
    url: str | None = Field(
        None, pattern=r"^https?://", description="vqa: base address of an OpenAI-compatible server"
    )
    model: str | None = Field(None, min_length=1, description="vqa: the model's name there")
    question: str = Field(
        "Does this picture show exactly this: {prompt}? Answer yes or no.",
        description="vqa: with {prompt} in it",
    )
    key_variable: str = Field(
        "LIDIT_VQA_KEY", description="vqa: environment variable with the server's key"
    )
    timeout: float = Field(60.0, gt=0, description="vqa: seconds for one answer")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.kind == "function") != (self.function is not None):
            raise ValueError(
                "function: give package.module:name with kind 'function', and with no other kind"
            )
        if (self.kind == "vqa") != (self.url is not None and self.model is not None):
            raise ValueError("url and model: give both with kind 'vqa', and with no other kind")
        if "{prompt}" not in self.question:
            raise ValueError(
                "question: must hold {prompt}, in whose place the picture's prompt is put"
            )
        return self


class LoraSettings(Settings):
    """Adapters in place of all weights: two thin matrices beside each chosen linear layer."""

    rank: int = Field(16, ge=1)
    alpha: int | None = Field(
        None, ge=1, description="their product is scaled by alpha / rank; None: 2 rank"
    )
    targets: str = Field(
        r".*\.(qkv|query|key_value|output|expand|contract)",
        description="regular expression over layers' names",
    )


class AlignSettings(Settings):
    """How a model learns from pairs of its own pictures of one caption, of which one was rewarded
    more.

    difference: the prediction is regressed to the one that the pictures were drawn with, moved
    towards the better picture and away from the worse; dpo: the error on the better one falls
    against that on the worse, both against the model that drew them.
    """

    kind: Literal["difference", "dpo"] = "difference"
    strength: float = Field(
        1.0, gt=0, description="difference: how far the target moves, for rewards of 1 and 0"
    )
    beta: float = Field(
        5.0, gt=0, description="dpo: how much of the difference of errors decides a pair"
    )
    kl: float = Field(
        0.0, ge=0, description="weight of the squared distance from the start's predictions"
    )
