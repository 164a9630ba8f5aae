"""What MLflow runs to serve a tracked model: a copy of this file lies beside the model's own files.

`mlflow.pyfunc.load_model("models:/NAME@ALIAS").predict(["a red circle"])` gives a PNG per prompt,
in base64. Prompts that are drawn together get the seeds SEED, SEED + 1, ...
"""

from __future__ import annotations

import base64
import io
from typing import Any

import mlflow

from lidit import LIDiTPipeline
from lidit.config.fields import LARGEST_SEED


class PromptModel(mlflow.pyfunc.PythonModel):
    """Prompts in, pictures out."""

    def load_context(self, context: Any) -> None:
        """Load the model folder; LLMs follow with the first prompt."""
        self.pipe = LIDiTPipeline.from_pretrained(context.artifacts["model"])
        self.pipe.set_progress_bar_config(disable=True)

    def predict(
        self, context: Any, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        """Draw one picture per prompt. params: seed, steps (0: the model's own), guidance_scale
        (negative: its own).
        """
        chosen = params or {}
        seed, steps, scale = (
            chosen.get("seed", 0),
            chosen.get("steps", 0),
            chosen.get("guidance_scale", -1.0),
        )
        images = self.pipe(
            model_input,
            seed=[(seed + place) % (LARGEST_SEED + 1) for place in range(len(model_input))],
            num_inference_steps=steps or None,
            guidance_scale=None if scale < 0 else scale,
        ).images
        return [_png(image) for image in images]


def _png(image: Any) -> str:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return base64.b64encode(sink.getvalue()).decode()


mlflow.models.set_model(PromptModel())
