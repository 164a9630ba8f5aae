"""What a user loads: a trained model's folder as a diffusers pipeline, its LLMs, its model card."""

from lidit.pipeline.components import INDEX
from lidit.pipeline.output import LIDiTPipelineOutput, image_bytes
from lidit.pipeline.pipeline import LIDiTPipeline
from lidit.pipeline.saving import save_pipeline
from lidit.pipeline.settings import PipelineSettings

__all__ = [
    "INDEX",
    "LIDiTPipeline",
    "LIDiTPipelineOutput",
    "PipelineSettings",
    "image_bytes",
    "save_pipeline",
]
