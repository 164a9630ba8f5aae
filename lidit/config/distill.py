"""Settings of `lidit distill`: a student that draws as its teacher does, in fewer evaluations of
the network.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lidit.config import (
    CodecSettings,
    DataSettings,
    EvaluateSettings,
    Recipe,
    RunRecipe,
    TrainSettings,
)
from lidit.config.fields import Place
from lidit.config.settings import Settings

Scale = Annotated[float, Field(ge=0)]


class DistillSettings(Settings):
    """What a student learns from its teacher, who samples with guidance as its folder says."""

    kind: Literal["guidance", "progressive", "consistency"] = Field(
        description="guidance: the guided prediction in one evaluation; progressive: several steps "
        "in one; "
        "consistency: the same, step by step through the student's own jumps"
    )
    sampler_steps: int | None = Field(
        None, ge=1, description="steps of the student; guidance: None, as the teacher"
    )
    teacher_steps: int | None = Field(
        None, ge=1, description="of the same walk; None: twice the student's"
    )
    guidance_range: tuple[Scale, Scale] | None = Field(
        None,
        description="the guidance scale becomes an input of the student, learnt between these; "
        "None: fixed",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "guidance":
            if self.teacher_steps is not None:
                raise ValueError(
                    "teacher_steps: guidance is learnt at every noise level, not along a walk; "
                    "leave it out"
                )
        elif self.sampler_steps is None:
            raise ValueError(
                f"sampler_steps: say how many steps the student of kind {self.kind!r} takes"
            )
        if self.teacher_steps and self.sampler_steps and self.teacher_steps % self.sampler_steps:
            raise ValueError(
                f"teacher_steps: {self.teacher_steps} is no multiple of sampler_steps = "
                f"{self.sampler_steps}"
            )
        if self.guidance_range and self.guidance_range[0] >= self.guidance_range[1]:
            raise ValueError(
                "guidance_range: give the smaller scale first; for one scale leave it out"
            )
        return self

    @property
    def walk_steps(self) -> tuple[int, int]:
        """Steps of the student and of its teacher from noise to data; not of kind guidance."""
        assert self.sampler_steps is not None
        return self.sampler_steps, self.teacher_steps or 2 * self.sampler_steps


class DistillStage(DistillSettings):
    """One student; the next stage's teacher."""

    train_steps: int | None = Field(None, ge=1, description="optimizer steps; None: train.steps")


class Distillation(RunRecipe):
    """A chain of students, each with a run of its own; the last one is published as the run of this
    name.
    """

    teacher: Place = Field(description="model folder")
    codec: CodecSettings | None = Field(
        None, description="of the corpus's latents; None: as the teacher's folder says"
    )
    activation_checkpointing: bool = False
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    stages: tuple[DistillStage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.train.init_from is not None:
            raise ValueError(
                "train.init_from: a student starts with its teacher's weights; leave it out"
            )
        return self


class StudentRecipe(Recipe):
    """One stage as the training engine takes it: the teacher's recipe with a loss of its own."""

    teacher: Place = Field(
        description="model folder; its weights are a fact of the run, its place is not"
    )
    distill: DistillSettings
