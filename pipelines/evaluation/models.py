"""Trained models for the jobs that measure them: loaded onto this machine, identified by their
weights.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from lidit.config import Recipe, SamplerChanges, SamplerSettings, TrackingSettings
from lidit.config.json_object import read_object
from lidit.config.settings import validate
from lidit.errors import InputError
from lidit.pipeline import INDEX, LIDiTPipeline
from lidit.text.specs import default_device
from pipelines.runtime.kernels import avoid_plan_building, use_tensor_cores

# The keys of model_index.json that scores depend on, apart from the weights.
SAMPLED_BY = ("sampler", "objective", "codec", "height", "width")


def load_pipeline(
    model: Path, changes: SamplerChanges | None = None, drawing: bool = False
) -> LIDiTPipeline:
    """The model folder's pipeline on this process's GPU where there is one, without a bar of its
    own.

    changes: to the model's own sampler. drawing: whether images are all that is wanted: on a GPU
    they are drawn in bfloat16; measures compare losses, in float32. Raises InputError for a folder
    that is no model, or changes that no sampler takes.
    """
    # it counts loaded parts: one here, LLMs and codec come later
    diffusers.utils.logging.disable_progress_bar()
    device = default_device()
    on_gpu = torch.device(device).type == "cuda"
    pipe = LIDiTPipeline.from_pretrained(
        model, dtype=torch.bfloat16 if on_gpu and drawing else None
    )
    if changes is not None:
        pipe.change_sampler(changes)
    pipe.set_progress_bar_config(disable=True)  # jobs count images, not the steps of one batch
    avoid_plan_building()  # prompts come in every length
    if on_gpu:
        use_tensor_cores()
    return pipe.to(device)


def tracking_of(model: Path) -> TrackingSettings:
    """The tracking settings of the run that made the model: its scores are tracked beside it."""
    recipe = run_recipe(model.resolve().parent)
    return recipe.tracking if recipe else TrackingSettings()


def run_recipe(folder: Path) -> Recipe | None:
    """The recipe of the run in this folder, OUTPUT/NAME; None for a model that came without one.

    A training with another loss has sections of its own besides, which are left out.
    """
    try:
        tree = json.loads((folder / "recipe.json").read_text())
        return Recipe.model_validate(
            {key: value for key, value in tree.items() if key in Recipe.model_fields}
        )
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def model_identity(model: Path, changes: SamplerChanges | None = None) -> dict[str, Any]:
    """The weights and the settings they sample with, with `changes` to the model's own sampler:
    scores are of these.

    Raises InputError where `model` is no model folder, or its sampler cannot be changed so.
    """
    weights, sampled_by = weights_digest(model), read_index(model)
    if changes is not None and changes.model_dump(exclude_none=True):
        own = validate(SamplerSettings, sampled_by["sampler"] or {}, f"{model / INDEX}: sampler")
        sampled_by["sampler"] = changes.applied(own).model_dump(mode="json")
    return {"weights": weights, **sampled_by}


def weights_digest(model: Path) -> str:
    """sha256 over the model folder's weight files.

    Raises InputError for a folder without weights: no files have a digest too, and scores would be
    filed under it.
    """
    if not (model / INDEX).is_file():
        raise InputError(
            f"{model}: no {INDEX}, so this is not a model folder written by lidit train"
        )
    weights = sorted(model.rglob("*.safetensors"))
    if not weights:
        raise InputError(
            f"{model}: no weights (*.safetensors) in the model folder; copy it again, whole"
        )
    total = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def read_index(model: Path) -> dict[str, Any]:
    """The settings in model_index.json that the model samples with. Raises InputError for a folder
    of no model.
    """
    path = model / INDEX
    index = read_object(path, "give a model folder written by lidit train")
    return {name: index.get(name) for name in SAMPLED_BY}
