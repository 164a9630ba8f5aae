"""What a comparison page is made of: images of the common prompts by each run's model, its score
files, its curves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lidit.config import Recipe
from lidit.config.settings import flatten
from lidit.errors import InputError
from lidit.evals.comparison import RunPage, check_names, write_report
from lidit.pipeline import image_bytes
from pipelines import tracking
from pipelines.evaluation.models import load_pipeline, model_identity, run_recipe
from pipelines.runtime.progress import ProgressBar

SHOWN_CURVES = ("train/loss", "validation/loss", "train/images_per_second")
# Score file -> prefix of its scores on the page, and the command that makes it again.
SCORE_FILES = {
    "evaluation/scores.json": ("", "lidit evaluate {model}"),
    "evaluation/binding.json": ("binding/", "lidit evaluate {model} --binding"),
}
NOT_COMPARED_BY = ("batch_size",)  # settings that change the time a score takes, not the score


def compare_runs(
    folders: Sequence[Path], prompts: Sequence[str], seeds: Sequence[int], out: Path
) -> Path:
    """Sample every prompt with every seed by the model of every run and write the page to `out`.

    folders: OUTPUT/NAME as `lidit train` leaves them. Without prompts the first run's own sample
    prompts are taken. Raises InputError for a folder without a trained model, for scores that
    cannot be read and for fewer than two runs, before anything is sampled.
    """
    names = _names(folders)
    check_names(names)
    for folder in folders:
        if not (folder / "model").is_dir():
            raise InputError(
                f"{folder}: no trained model; give run folders, OUTPUT/NAME, with a model/ inside"
            )
    recipes = [run_recipe(folder) for folder in folders]
    chosen = list(prompts) or next(
        (list(r.train.sample_prompts) for r in recipes if r and r.train.sample_prompts), []
    )
    if not chosen:
        raise InputError(
            "no prompts: give some with --prompt, the runs have no sample prompts of their own"
        )
    known = [_scores(name, folder) for name, folder in zip(names, folders)]
    pages = []
    with ProgressBar("report", len(folders) * len(chosen) * len(seeds), "images") as progress:
        for name, folder, recipe, scores in zip(names, folders, recipes, known):
            drawn = load_pipeline(folder / "model")(
                [prompt for prompt in chosen for _ in seeds],
                seed=list(seeds) * len(chosen),
                output_type="pt",
            )
            sampled = image_bytes(drawn.images)
            images = {
                p: list(sampled[i * len(seeds) : (i + 1) * len(seeds)])
                for i, p in enumerate(chosen)
            }
            facts = {**(flatten(recipe) if recipe else {}), **scores.facts}
            curves = _curves(folder, recipe)
            pages.append(
                RunPage(
                    name, facts, scores.values, curves, images, scores.measured, tuple(scores.notes)
                )
            )
            progress.advance(len(sampled), name)
    write_report(out, pages, seeds)
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names; with the name of the folder above where two are alike."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [f"{folder.resolve().parent.name}/{folder.resolve().name}" for folder in folders]


@dataclass(frozen=True)
class _Scores:
    """`measured`: score -> the settings it was measured with; `facts`: score file -> the same
    settings.
    """

    values: dict[str, float] = field(default_factory=dict)
    measured: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _scores(name: str, folder: Path) -> _Scores:
    """The run's scores. Scores of other weights or another sampler than the model's now are left
    out, with a note.

    Raises InputError for a score file that cannot be read.
    """
    model, scores = folder / "model", _Scores()
    now = model_identity(model)
    for file, (prefix, command) in SCORE_FILES.items():
        if not (folder / file).is_file():
            continue
        again = f"run {command.format(model=model)}"
        metrics, made_with = _read_scores(folder / file, again)
        then = made_with.get("model", {"record of what it was measured on": None})
        if changed := [key for key, value in then.items() if key not in now or now[key] != value]:
            scores.notes.append(
                f"{name}: {file} is left out, its scores are not of the model that drew these "
                f"pictures (other {', '.join(changed)}); {again}"
            )
            continue
        settings = {
            key: value for key, value in made_with["settings"].items() if key not in NOT_COMPARED_BY
        }
        how = ", ".join(f"{key}={value}" for key, value in settings.items())
        how += f", {now['width']} x {now['height']} pixels"
        scores.values.update({f"{prefix}{key}": value for key, value in metrics.items()})
        scores.measured.update({f"{prefix}{key}": how for key in metrics})
        scores.facts[file] = how
    return scores


def _read_scores(path: Path, again: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics, and what they were made with (empty in files of earlier versions)."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        metrics = {key: float(value) for key, value in record["metrics"].items()}
        made_with = record.get("made_with", {})
        if made_with and not (
            isinstance(made_with["model"], dict) and isinstance(made_with["settings"], dict)
        ):
            raise TypeError("made_with is not what lidit evaluate writes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not readable as scores ({error}); delete it and {again}"
        ) from None
    return metrics, made_with


def _curves(folder: Path, recipe: Recipe | None) -> dict[str, list[tuple[int, float]]]:
    run_id = tracking.read_run_id(folder)
    if not run_id:
        return {}
    uri = tracking.store_uri(recipe.tracking.uri if recipe else None, folder.resolve().parent)
    return tracking.curves(uri, run_id, SHOWN_CURVES)
