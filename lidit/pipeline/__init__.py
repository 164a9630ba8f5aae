"""What a user loads: a trained model's folder as a diffusers pipeline, its LLMs, its model card."""

from lidit.pipeline.pipeline import INDEX, LIDiTPipeline, save_pipeline

__all__ = ["INDEX", "LIDiTPipeline", "save_pipeline"]
