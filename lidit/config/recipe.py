"""The recipe: every setting of the system, one pydantic tree. Unknown keys, wrong types and values
out of range are refused.

A recipe (YAML) is one `Recipe`; `pipelines` and `jobs` pass its sections on as they are. Sections
are frozen, so a setting can be read anywhere and changed nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from lidit.config.corpus import CodecSettings, IngestSettings, PoolSettings
from lidit.config.encoder import EncoderSettings
from lidit.config.engine import EngineSettings
from lidit.config.fields import Place
from lidit.config.model import (
    ModelSettings,
    ObjectiveSettings,
    SamplerSettings,
)
from lidit.config.online import OnlineSettings
from lidit.config.settings import Settings
from lidit.config.training import (
    CardSettings,
    DataSettings,
    EvaluateSettings,
    LoopSettings,
    PlanSettings,
    TrackingSettings,
    TrainSettings,
)

Stage = Literal["ingest", "embed", "latents", "train", "evaluate"]


def _absolute(place: str | None) -> str | None:
    """A folder's absolute path; a hub id as it is."""
    return str(Path(place).resolve()) if place and Path(place).is_dir() else place


@dataclass(frozen=True)
class Written:
    """The file that a recipe was read from; recipes of one content are equal, however they were
    written.
    """

    text: str = field(compare=False)


class RunRecipe(Settings):
    """What every training run is made of, of LI-DiT or of a codec."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="run name: the same name resumes the run",
    )
    output: Place = Field("runs", description="folder of runs; the run's files are in OUTPUT/NAME")
    corpus: Place = Field(description="folder or URL")
    train: LoopSettings = LoopSettings()
    engine: EngineSettings = EngineSettings()
    tracking: TrackingSettings = TrackingSettings()
    _written: Written = PrivateAttr(Written(""))

    @property
    def written(self) -> str:
        """The recipe's file as a person wrote it, overrides as comments; empty for a recipe made in
        Python.
        """
        return self._written.text

    def keep_written(self, text: str) -> Self:
        """This recipe, which remembers the file it was read from."""
        self._written = Written(text)
        return self

    @field_validator("output")
    @classmethod
    def _a_folder(cls, output: str) -> str:
        # Path("s3://bucket") is the local folder `s3:/bucket`: every node would write a run of its
        # own.
        if "://" in output:
            raise ValueError(
                "must be a folder that every node sees, not a URL; mount shared storage, "
                "give its path"
            )
        return output

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.train.non_finite == "skip" and (
            self.engine.accumulation > 1 or self.engine.min_workers
        ):
            raise ValueError(
                "train.non_finite: 'skip' needs whole batches: engine.accumulation = 1 and no "
                "engine.min_workers "
                "(fewer workers take a batch in parts); use 'stop'"
            )
        if self.train.keep_best and not self.train.validate_every:
            raise ValueError(
                "train.keep_best: the best checkpoint has the lowest validation loss; set "
                "train.validate_every"
            )
        if self.engine.min_workers and self.engine.min_workers > self.engine.workers:
            raise ValueError(
                f"engine.min_workers: {self.engine.min_workers} must not exceed engine.workers "
                f"= {self.engine.workers}"
            )
        parts = self.engine.workers * self.engine.accumulation
        if self.train.batch_size % parts:
            raise ValueError(
                f"train.batch_size: {self.train.batch_size} must be divisible by engine.workers x "
                f"engine.accumulation = {parts}"
            )
        return self

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    def placed(self, output: str, corpus: str) -> Self:
        """With these places, and local folders absolute: workers start in other folders."""
        return self.model_copy(update={"output": output, "corpus": corpus})


class Recipe(RunRecipe):
    """One training run of LI-DiT and everything it depends on."""

    sources: tuple[Place, ...] = Field(
        (), description="what `lidit run` ingests when the corpus does not exist"
    )
    ingest: IngestSettings = IngestSettings()
    encoders: tuple[EncoderSettings, ...] = Field(
        min_length=1, description="the LLMs that read the captions"
    )
    pool: PoolSettings = PoolSettings()
    pools: dict[str, PoolSettings] = Field(
        default_factory=dict, description="encoder -> a pool of its own"
    )
    online: OnlineSettings | None = Field(
        None, description="compute states as training needs them, beside it"
    )
    codec: CodecSettings = CodecSettings()
    model: ModelSettings = ModelSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    sampler: SamplerSettings = SamplerSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    plan: PlanSettings = PlanSettings()
    card: CardSettings = CardSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [encoder.name for encoder in self.encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"encoders: the names must differ, found {names}")
        if self.train.validate_every and not self.data.validation_fraction:
            raise ValueError(
                "train.validate_every: nothing is held out; set data.validation_fraction"
            )
        if self.objective.kind == "ddpm" and self.sampler.steps > self.objective.train_steps:
            raise ValueError(
                f"sampler.steps: {self.sampler.steps} exceed the {self.objective.train_steps} "
                "noise levels of "
                "objective.train_steps; set fewer steps"
            )
        if unknown := sorted(set(self.pools) - set(names)):
            raise ValueError(
                f"pools: no encoder is called {unknown[0]!r}; encoders: {', '.join(names)}"
            )
        if self.online and any(self.pool_of(name).distinct for name in names):
            raise ValueError("pool.distinct: with online each unit is computed alone; leave it out")
        if self.model.fusion.mode == "none" and len(names) != 1:
            raise ValueError(
                f"model.fusion.mode: 'none' takes exactly one encoder, found {len(names)}: {names}"
            )
        apart = [encoder.name for encoder in self.encoders if encoder.keeps_layers_apart]
        # of an ablation's, an arm may read another
        if self.model.layers == "one" and len(apart) == len(names):
            raise ValueError(
                f"model.layers: 'one' reads one state per token, but encoder {apart[0]} keeps "
                "its layers apart; set "
                "mean, learned or per_block, or give the encoder join: concatenate"
            )
        if self.model.layers != "one" and not apart:
            raise ValueError(
                f"model.layers: {self.model.layers!r} needs several layers of a token; give an "
                "encoder layers and "
                "join: separate"
            )
        return self

    def placed(self, output: str, corpus: str) -> Self:
        codec = self.codec.model_copy(update={"model": _absolute(self.codec.model)})
        train = self.train.model_copy(update={"init_from": _absolute(self.train.init_from)})
        return super().placed(output, corpus).model_copy(update={"codec": codec, "train": train})

    def pool_of(self, encoder: str) -> PoolSettings:
        """The pool that computes this encoder's states."""
        return self.pools.get(encoder, self.pool)
