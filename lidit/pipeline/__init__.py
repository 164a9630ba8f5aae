"""What a user loads: a trained model's folder as a diffusers pipeline, its LLMs, its model card."""

from lidit.pipeline.pipeline import INDEX, LIDiTPipeline
from lidit.pipeline.saving import save_pipeline
from lidit.pipeline.settings import PipelineSettings

__all__ = ["INDEX", "LIDiTPipeline", "PipelineSettings", "save_pipeline"]
