"""What a training run tells the tracker: settings, data, environment, and at its end the model and
its curves.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import torch

from lidit.config import Recipe, RunRecipe
from lidit.config.codec import CodecRecipe
from lidit.config.settings import flatten
from lidit.data.families import Families
from lidit.errors import one_line
from lidit.models import LIDiT
from lidit.pipeline import INDEX
from lidit.plots import plot_lines
from lidit.store import Corpus, digest_of
from pipelines import tracking
from pipelines.tracking.flavor import write_flavor
from pipelines.tracking.inputs import corpus_input, family_input
from pipelines.tracking.origin import DESCRIPTION, command_line, write_environment
from pipelines.tracking.runs import MADE_FROM

log = logging.getLogger(__name__)
MODEL = "model"
ENVIRONMENT = "environment"  # a folder of the run: requirements.txt, hardware.json


@contextmanager
def tracked_training(
    recipe: RunRecipe, folder: Path, uri: str, corpus: Corpus, tags: dict[str, str]
) -> Iterator[tracking.Tracker]:
    """The tracker's run of this training, with its settings, its data and what it runs on."""
    families = _families(corpus, tags)
    inputs = [corpus_input(corpus)]
    if families is not None:
        inputs += [*map(family_input, families.texts.values()), family_input(families.latents)]
    tags = {
        **tags,
        "lidit.corpus_digest": corpus.digest,
        "lidit.ray_job": os.environ.get("RAY_JOB_ID", "embedded"),
        MADE_FROM: " ".join(data.digest for data in inputs),
        DESCRIPTION: _description(recipe, folder, corpus, families),
    }
    key = digest_of({"name": recipe.name, "output": recipe.output})[:32]
    experiment, settings = recipe.tracking.experiment, _parameters(recipe, families)
    with tracking.tracked_run(uri, experiment, recipe.name, key, settings, tags, folder) as tracker:
        for data in inputs:
            tracker.dataset(data)
        (folder / "recipe.json").write_text(recipe.model_dump_json(indent=1))
        tracker.artifact(folder / "recipe.json")
        if recipe.written:
            (folder / "recipe.yaml").write_text(recipe.written)
            tracker.artifact(folder / "recipe.yaml")
        cluster = ray.cluster_resources() if ray.is_initialized() else {}
        tracker.artifact(write_environment(folder / ENVIRONMENT, cluster), ENVIRONMENT)
        yield tracker


def _families(corpus: Corpus, tags: dict[str, str]) -> Families | None:
    """What the fingerprints in the tags name; None for a codec, which reads images."""
    prefix = "lidit.text."
    texts = {
        name.removeprefix(prefix): value for name, value in tags.items() if name.startswith(prefix)
    }
    if not texts:
        return None
    return Families(
        corpus.latent_family(tags["lidit.latents"]),
        {name: corpus.text_family(value, rolling=True) for name, value in texts.items()},
    )


def _parameters(recipe: RunRecipe, families: Families | None) -> dict[str, str]:
    """What the recipe changes, and what its defaults came to: no page of settings
    that nobody set.
    """
    found = flatten(recipe, given_only=True)
    found["engine.world_size"] = str(recipe.engine.workers)
    if isinstance(recipe, Recipe) and families is not None:
        shape = families.latent_shape
        with torch.device("meta"):  # shapes are enough
            model = LIDiT.from_settings(
                recipe.model, families.widths, shape[0], families.stored_layers
            )
        found["model.parameters"] = str(model.num_parameters())
        for name, family in families.texts.items():
            blocks = family.spec["blocks"]
            found[f"encoders.{name}.block"] = f"{blocks} of {family.spec['total_blocks']}"
            found[f"encoders.{name}.instruction"] = family.spec["instruction"]
    return found


def _description(recipe: RunRecipe, folder: Path, corpus: Corpus, families: Families | None) -> str:
    """The run's page in MLflow, in Markdown."""
    if isinstance(recipe, CodecRecipe):
        command = f"lidit train-codec {folder / 'recipe.json'}"
    elif type(recipe) is Recipe:
        command = f"lidit train {folder / 'recipe.json'}"
    else:  # an alignment's or a student's recipe is made of another file
        command = command_line(sys.argv)
    lines = [
        f"**{recipe.name}**, {recipe.train.steps:,} steps of {recipe.train.batch_size} samples."
    ]
    if families is not None:
        read_by = ", ".join(
            f"{name} ({family.spec['model_type']})" for name, family in families.texts.items()
        )
        lines.append(f"Prompts are read by {read_by}; latents are `{families.latents.directory}`.")
    lines += [
        f"Data: `{corpus.folder.location}`, {corpus.num_samples:,} samples.",
        f"Folder: `{folder}`. Goes on with `{command}`.",
        "Pictures of every step: *Model metrics*, section *samples*.",
    ]
    return "\n\n".join(lines)


def track_model(recipe: RunRecipe, tracker: tracking.Tracker, folder: Path, step: int) -> None:
    """Track the published model and the run's curves; register the model if the recipe says so."""
    if isinstance(recipe, Recipe) and (folder / MODEL / INDEX).is_file():
        tracker.model(folder / MODEL, MODEL, step)
        _track_flavor(recipe, tracker, folder / "mlflow-model", step)
        tracker.model_is_whole(MODEL, step)
    else:  # a codec draws nothing by itself
        tracker.artifact(folder / MODEL, MODEL)
    plot_curves(tracker, folder / "plots")
    if recipe.tracking.registered_model:
        description = f"{recipe.name} after {step:,} steps, trained on `{recipe.corpus}`"
        tracker.register(
            recipe.tracking.registered_model, MODEL, recipe.tracking.alias, description
        )


def _track_flavor(recipe: Recipe, tracker: tracking.Tracker, folder: Path, step: int) -> None:
    """Put what makes it an MLflow model beside the tracked model."""
    prompts = recipe.train.sample_prompts
    try:
        tracker.model(
            write_flavor(folder, prompts[0] if prompts else "a photo of a cat"), MODEL, step
        )
    except Exception as error:
        # the model is trained and tracked; only MLflow's own loader will miss it
        log.warning("the model cannot be loaded by mlflow.pyfunc: %s", one_line(error, 200))


def plot_curves(tracker: tracking.Tracker, folder: Path) -> None:
    """Plot and track loss over steps and validation loss per noise level, as the
    tracker has them.
    """
    folder.mkdir(exist_ok=True)
    names = {name: name for name in ("train/loss", "validation/loss")}
    levels = {
        name: f"t = {name.rpartition('_t')[2]}" for name in tracker.known("validation/loss_t")
    }
    for file, title, metrics in (
        ("loss.png", "loss", names),
        ("timesteps.png", "validation loss by timestep", levels),
    ):
        series = {label: tracker.history(name) for name, label in metrics.items()}
        if shown := {label: points for label, points in series.items() if points[0]}:
            plot_lines(folder / file, shown, "loss", title)
            tracker.artifact(folder / file, "plots")
