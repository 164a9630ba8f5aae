"""Settings of `lidit align`: a model learns from rewards of the pictures that it draws itself."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lidit.config import (
    CodecSettings,
    DataSettings,
    EvaluateSettings,
    Recipe,
    RunRecipe,
    SamplerChanges,
    TrainSettings,
)
from lidit.config.fields import Place, Seed
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
    away: float = Field(
        0.25,
        ge=0,
        description="difference: how far from the worse picture, for 1 towards the better one; a "
        "run that flees as far as it approaches loses its way after some rounds",
    )
    beta: float = Field(
        5.0, gt=0, description="dpo: how much of the difference of errors decides a pair"
    )
    kl: float = Field(
        0.0, ge=0, description="weight of the squared distance from the start's predictions"
    )


class RolloutSettings(Settings):
    """A round: pictures of the corpus's captions are drawn and rewarded, then so many steps learn
    from them.
    """

    prompts: int = Field(64, ge=1, description="captions of a round, over all workers")
    pictures: int = Field(4, ge=2, description="of each caption; half as many pairs at most")
    steps: int = Field(8, ge=1, description="optimizer steps of a round")
    batch_size: int = Field(64, ge=1, description="pictures that a worker draws at once")
    sampler: SamplerChanges = Field(
        SamplerChanges(), description="how they are drawn; default: as the start samples"
    )


class WatchSettings(Settings):
    """The scene benchmark's prompts, among them pairs and templates that no caption has, scored as
    training goes.
    """

    every: int = Field(0, ge=0, description="optimizer steps; 0: never")
    per_tag: int = Field(8, ge=1, description="prompts per category")
    seed: Seed = Field(
        2, description="another than that of the evaluation, whose prompts stay unseen"
    )


class Alignment(RunRecipe):
    """One run of `lidit align`, as its file has it."""

    start: Place = Field(description="model folder; its weights are where the run starts")
    prompts: Place | None = Field(
        None,
        description="corpus of the captions that are drawn, with states and without images; None: "
        "`corpus`",
    )
    align: AlignSettings = AlignSettings()
    reward: RewardSettings = RewardSettings()
    rollout: RolloutSettings = RolloutSettings()
    lora: LoraSettings | None = Field(None, description="adapters only; None: all weights")
    watch: WatchSettings = WatchSettings()
    codec: CodecSettings | None = Field(
        None, description="of the corpus's latents; None: as the start's folder says"
    )
    activation_checkpointing: bool = False
    sampler: SamplerChanges = Field(
        SamplerChanges(), description="how the published model samples; default: the same"
    )
    data: DataSettings = DataSettings()
    train: TrainSettings = Field(TrainSettings(), description="batch_size counts pairs")
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.train.init_from is not None:
            raise ValueError(
                "train.init_from: an alignment starts with the weights of `start`; leave it out"
            )
        if self.train.validate_every:
            raise ValueError("train.validate_every: rewards are what counts here; use watch.every")
        if self.engine.zero_stage == 3 and (
            self.engine.min_workers or self.rollout.prompts % self.engine.workers
        ):
            raise ValueError(
                f"rollout.prompts: {self.rollout.prompts} must be divisible by engine.workers = "
                f"{self.engine.workers}, "
                "and engine.min_workers be left out, under ZeRO 3, whose workers draw in step"
            )
        if self.lora and self.engine.zero_stage == 3:
            raise ValueError("lora: adapters are small; use engine.zero_stage 0, 1 or 2")
        return self


class AlignRecipe(Recipe):
    """An alignment as the training engine takes it: the start's own recipe with pictures, rewards
    and a loss.
    """

    start: Place
    prompts: Place | None = None
    align: AlignSettings
    reward: RewardSettings
    rollout: RolloutSettings
    lora: LoraSettings | None = None
    watch: WatchSettings
