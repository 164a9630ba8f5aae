"""Trained models as the jobs on them need them: loaded for this machine, and identified by their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lidit.config import Recipe, TrackingSettings
from lidit.errors import InputError
from lidit.pipeline import INDEX, LIDiTPipeline
from lidit.text.specs import default_device


def load_pipeline(model: Path) -> LIDiTPipeline:
    """The model folder's pipeline on this process's GPU where there is one, without a bar of its own."""
    pipe = LIDiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)  # jobs count images, not the steps of one batch
    return pipe.to(default_device())


def run_recipe(folder: Path) -> Recipe | None:
    """The recipe of the run in this folder, OUTPUT/NAME; None for a model that came without one."""
    try:
        return Recipe.model_validate_json((folder / "recipe.json").read_text())
    except (OSError, ValueError):
        return None


def tracking_of(model: Path) -> TrackingSettings:
    """Where the run that made the model is tracked: what is found out about the model belongs beside it."""
    recipe = run_recipe(model.resolve().parent)
    return recipe.tracking if recipe else TrackingSettings()


def weights_digest(model: Path) -> str:
    """sha256 over the model folder's weight files. InputError where the folder is not a model's: no file has a digest
    too, and scores would be filed under it."""
    if not (model / INDEX).is_file():
        raise InputError(f"{model}: no {INDEX}, so this is not a model folder written by lidit train")
    weights = sorted(model.rglob("*.safetensors"))
    if not weights:
        raise InputError(f"{model}: no weights (*.safetensors) in the model folder; copy it again, whole")
    total = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
