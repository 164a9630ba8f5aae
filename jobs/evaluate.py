"""`lidit evaluate`: how well a model follows prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.start import run


def command(
    model: Annotated[Path, typer.Argument(help="Model folder written by `lidit train`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: per_tag=24 layout=simple")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: beside the model.")] = None,
) -> None:
    """Draw the scene benchmark's prompts and score the images by program, lax and strict, beside the chance floor.

    **Reads** a model folder; loads its LLMs. **Writes** scores.md, scores.json, results.jsonl (GenEval's format) and
    grid.png, and an MLflow run.

    **Example:** `lidit evaluate runs/demo/model per_tag=24`
    """
    from lidit.config import EvaluateSettings, TrackingSettings
    from lidit.settings import apply_overrides, validate

    settings = validate(EvaluateSettings, apply_overrides({}, overrides or []), "lidit evaluate")
    from pipelines.evaluate import evaluate_scenes

    scores = evaluate_scenes(model, settings, TrackingSettings(), out or model.resolve().parent / "evaluation")
    print(scores.table)
    print(f"{scores.folder}: {'written' if scores.computed else 'already there, for these weights and settings'}")


if __name__ == "__main__":
    run(command)
