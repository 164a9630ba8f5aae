"""Settings of `lidit ablate`: one training recipe, and the arms that differ from it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from lidit.config import Recipe
from lidit.config.fields import Seed
from lidit.config.settings import Settings, explain


class AblationScenes(Settings):
    """What every arm trains on: rendered scenes of some categories, equally often, and their
    captions.

    Scenes of two objects teach in hundreds of steps what a caption's words mean; of four alone it
    takes thousands.
    """

    count: int = Field(2400, ge=1)
    size: int = Field(32, ge=16)
    seed: Seed = 0
    layout: Literal["simple", "free"] = "simple"
    tags: tuple[str, ...] = Field(
        ("list2", "list3", "list4"), min_length=1, description="listK has K segments"
    )
    styles: tuple[str, ...] = Field(("clauses", "long"), min_length=1)


class AblationMeasures(Settings):
    """How an arm is judged: binding accuracy on scenes no arm has seen, without sampling."""

    tag: str = Field("list4", description="category of the scenes, which no arm has seen")
    kinds: tuple[Literal["binding", "attribute"], ...] = Field(("binding",), min_length=1)
    scenes: int = Field(
        128, ge=8, description="per kind of error and caption style; every segment is met"
    )
    points: int = Field(4, ge=1, description="measured at this many equal parts of the training")
    batch_size: int = Field(64, ge=1)


class AblationArm(Settings):
    encoders: tuple[str, ...] = Field(min_length=1, description="names out of recipe.encoders")
    model: dict[str, Any] = Field(
        default_factory=dict, description="what differs from recipe.model"
    )


class Ablation(Settings):
    """Arms that differ in their encoders and their model, and in nothing else: same data, seeds and
    steps.
    """

    scenes: AblationScenes = AblationScenes()
    measures: AblationMeasures = AblationMeasures()
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    arms: dict[str, AblationArm] = Field(min_length=1)
    recipe: Recipe = Field(
        description="what all arms share; its encoders are all that any arm uses"
    )

    @model_validator(mode="after")
    def _possible(self) -> Ablation:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} names a seed twice")
        for name in self.arms:
            try:
                self.arm_recipe(name, self.seeds[0])
            except ValidationError as error:
                # it would be taken for errors of this class's own fields
                raise ValueError(explain(Recipe, error, f"arms.{name}")) from None
        if self.recipe.ingest.resolution != self.scenes.size:
            raise ValueError(
                f"recipe.ingest.resolution: {self.recipe.ingest.resolution} differs from "
                "scenes.size "
                f"{self.scenes.size}, so arms would be judged at a size they never saw; set "
                "both to the same"
            )
        if self.recipe.train.init_from:
            raise ValueError(
                "recipe.train.init_from: arms start from weights drawn by their seed; leave it out"
            )
        if self.recipe.online:
            raise ValueError("recipe.online: all arms read the same stored states; leave it out")
        if self.recipe.train.non_finite == "skip" and self.recipe.engine.workers == 1:
            raise ValueError(
                "recipe.train.non_finite: an arm of one worker stops at a bad loss; leave "
                "'skip' out"
            )
        return self

    def arm_recipe(self, arm: str, seed: int) -> Recipe:
        """The training run of one arm. ValueError for an encoder that does not exist or a model
        that cannot be.
        """
        settings, tree = self.arms[arm], self.recipe.model_dump()
        known = {encoder["name"]: encoder for encoder in tree["encoders"]}
        unknown = [name for name in settings.encoders if name not in known]
        if unknown:
            raise ValueError(
                f"arms.{arm}.encoders: {unknown} are not in recipe.encoders: {', '.join(known)}"
            )
        tree |= {
            "name": f"{arm}-seed{seed}",
            "output": str(self.recipe.run_folder / "arms"),
            "encoders": [known[name] for name in settings.encoders],
            "model": _merged(tree["model"], settings.model),
            "data": {**tree["data"], "seed": seed},
        }
        return Recipe.model_validate(tree)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put over it, section by section."""
    changed = dict(base)
    for key, value in changes.items():
        inner = base.get(key)
        changed[key] = (
            _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
        )
    return changed
