"""What a comparison page is made of: a run's model draws the common prompts; its files and the tracker say the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lidit.config import Recipe
from lidit.errors import InputError
from lidit.evals.report import RunPage, check_names, write_report
from lidit.settings import flatten
from pipelines import tracking
from pipelines.models import load_pipeline, run_recipe
from pipelines.progress import Progress

SHOWN_CURVES = ("loss", "validation/loss", "images_per_second")
SCORE_FILES = ("evaluation/scores.json", "evaluation/binding.json")


def compare_runs(folders: Sequence[Path], prompts: Sequence[str], seeds: Sequence[int], out: Path) -> Path:
    """Draw every prompt with every seed by the model of every run and write the page to `out`.

    folders: OUTPUT/NAME as `lidit train` leaves them. Without prompts the first run's own sample prompts are taken.
    Raises InputError for a folder without a trained model and for fewer than two runs, before anything is drawn.
    """
    names = _names(folders)
    check_names(names)
    for folder in folders:
        if not (folder / "model").is_dir():
            raise InputError(f"{folder}: no trained model; give run folders, OUTPUT/NAME, with a model/ inside")
    recipes = [run_recipe(folder) for folder in folders]
    chosen = list(prompts) or next((list(r.train.sample_prompts) for r in recipes if r and r.train.sample_prompts), [])
    if not chosen:
        raise InputError("no prompts: give some with --prompt, the runs have no sample prompts of their own")
    pages = []
    with Progress("report", len(folders) * len(chosen) * len(seeds), "images") as progress:
        for name, folder, recipe in zip(names, folders, recipes):
            drawn = load_pipeline(folder / "model")(
                [prompt for prompt in chosen for _ in seeds], seed=list(seeds) * len(chosen), output_type="np"
            )
            images = {p: list(drawn[i * len(seeds) : (i + 1) * len(seeds)]) for i, p in enumerate(chosen)}
            facts = flatten(recipe) if recipe else {}
            pages.append(RunPage(name, facts, _scores(folder), _curves(folder, recipe), images))
            progress.advance(len(drawn), name)
    write_report(out, pages, seeds)
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names; with the folder above where two are alike."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [f"{folder.resolve().parent.name}/{folder.resolve().name}" for folder in folders]


def _scores(folder: Path) -> dict[str, float]:
    scores: dict[str, float] = {}
    for file in SCORE_FILES:
        path = folder / file
        if path.is_file():
            prefix = "" if file == SCORE_FILES[0] else "binding/"
            scores |= {f"{prefix}{name}": value for name, value in json.loads(path.read_text())["metrics"].items()}
    return scores


def _curves(folder: Path, recipe: Recipe | None) -> dict[str, list[tuple[int, float]]]:
    path = folder / "mlflow-run"
    if not path.is_file():
        return {}
    uri = tracking.store_uri(recipe.tracking.uri if recipe else None, folder.resolve().parent)
    return tracking.curves(uri, path.read_text(), SHOWN_CURVES)
