"""What a person may set: the recipe and its sections, the other kinds of recipe, the files that
ship with us.
"""

from lidit.config.corpus import CodecSettings, IngestSettings, PoolSettings
from lidit.config.encoder import PAPER_INSTRUCTION, EncoderSettings
from lidit.config.engine import EngineSettings
from lidit.config.model import (
    FusionSettings,
    ModelSettings,
    ObjectiveSettings,
    RefinerSettings,
    SamplerSettings,
)
from lidit.config.online import OnlineSettings
from lidit.config.recipe import Recipe, RunRecipe, Stage
from lidit.config.training import (
    DataSettings,
    EncoderShape,
    EvaluateSettings,
    LoopSettings,
    OptimizerSettings,
    PlanSettings,
    SamplerChanges,
    TrackingSettings,
    TrainSettings,
)

__all__ = [
    "PAPER_INSTRUCTION",
    "CodecSettings",
    "DataSettings",
    "EncoderSettings",
    "EncoderShape",
    "EngineSettings",
    "EvaluateSettings",
    "FusionSettings",
    "IngestSettings",
    "LoopSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OnlineSettings",
    "OptimizerSettings",
    "PlanSettings",
    "PoolSettings",
    "Recipe",
    "RefinerSettings",
    "RunRecipe",
    "SamplerChanges",
    "SamplerSettings",
    "Stage",
    "TrackingSettings",
    "TrainSettings",
]
