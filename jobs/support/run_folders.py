"""Run folders, OUTPUT/NAME, as they lie on disk: read without Ray, a model or the tracker."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lidit.errors import InputError, no_corpus

RECIPE, POSITION = "recipe.json", "position.json"
FACTS = "run.json"  # what a run is made of; the tracker's copy of a recipe has none beside it
MODEL, MODEL_INDEX = "model", "model_index.json"
CORPUS_FILE = "corpus.json"
STEP = re.compile(r"step-(\d{9})$")


@dataclass(frozen=True)
class RunFolder:
    """step: of the finished model, else of the last checkpoint; 0 before the first."""

    name: str
    folder: str
    kind: Literal["model", "codec"]
    state: Literal["running", "finished", "stopped"]
    step: int
    steps: int
    checkpoint: str | None
    resume: str


def runs_below(folder: Path) -> Iterator[RunFolder]:
    """The runs of an OUTPUT folder, or of folders below it, in the order of their names."""
    for path in sorted(folder.rglob(RECIPE)):
        # Checkpoints and evaluations have files of their own: a run's recipe lies beside its steps.
        if not any(part.startswith(("step-", ".")) for part in path.relative_to(folder).parts):
            found = read_run(path.parent) if (path.parent / FACTS).is_file() else None
            if found is not None:
                yield found


def read_run(folder: Path) -> RunFolder | None:
    """The run in a folder; None where there is none."""
    recipe = read_json(folder / RECIPE)
    if not isinstance(recipe.get("train"), dict) or "name" not in recipe:
        return None
    finished = read_json(folder / "model" / "finished.json").get("step")
    checkpoint = _last_checkpoint(folder)
    steps = int(recipe["train"].get("steps", 0))
    step = int(finished) if finished is not None else _step(checkpoint)
    kind: Literal["model", "codec"] = "model" if "encoders" in recipe else "codec"
    state: Literal["running", "finished", "stopped"] = "stopped"
    if is_held(folder):
        state = "running"
    elif finished is not None and step >= steps:
        state = "finished"
    return RunFolder(
        name=str(recipe["name"]),
        folder=str(folder),
        kind=kind,
        state=state,
        step=step,
        steps=steps,
        checkpoint=None if checkpoint is None else str(checkpoint),
        resume=_resume(recipe, folder / RECIPE),
    )


def _resume(recipe: dict[str, Any], path: Path) -> str:
    """What takes up the run: an alignment's or a student's recipe is made of another file."""
    for command, section in (("align", "align"), ("distill", "distill")):
        if section in recipe:
            return f"the same lidit {command} command as before"
    return f"lidit {'train' if 'encoders' in recipe else 'train-codec'} {path}"


def required_run(folder: Path) -> RunFolder:
    """The run in a folder. Raises InputError where there is none, with those that are near."""
    found = read_run(folder)
    if found is None:
        near = [str(run.folder) for run in runs_below(folder)] if folder.is_dir() else []
        hint = (
            f"; there are {', '.join(near[:5])}"
            if near
            else "; a run is OUTPUT/NAME of lidit train"
        )
        raise InputError(f"{folder}: no run here{hint}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none: a run that dies leaves files in any
    state.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_held(folder: Path) -> bool:
    """Whether a process works in the folder now."""
    if not (folder / ".owner").exists():
        return False
    from lidit.store.files.owner import is_owned

    return is_owned(folder)


def _last_checkpoint(folder: Path) -> Path | None:
    steps = (
        sorted((path for path in folder.iterdir() if STEP.search(path.name)), reverse=True)
        if folder.is_dir()
        else []
    )
    return next(
        (
            path
            for path in steps
            if (path / POSITION).is_file() and (path / "rank-00000.json").is_file()
        ),
        None,
    )


def _step(checkpoint: Path | None) -> int:
    match = STEP.search(checkpoint.name) if checkpoint is not None else None
    return int(match.group(1)) if match else 0


def model_folder(folder: Path) -> Path:
    """The model folder of a run, OUTPUT/NAME, or the folder itself where it is a model's. Raises
    InputError for others.
    """
    model = folder / MODEL if (folder / MODEL / MODEL_INDEX).is_file() else folder
    if not model.is_dir():
        raise InputError(f"{folder}: no run or model here; give OUTPUT/NAME or OUTPUT/NAME/model")
    require_model(model)
    return model


def require_corpus(corpus: str) -> None:
    """Refuse a place on this machine without a corpus before Arrow is loaded; what else can be
    wrong with one, and with an address, its reader says.
    """
    if "://" in corpus:
        return
    folder = Path(corpus).expanduser().absolute()
    if (folder / CORPUS_FILE).exists():
        return
    exists = folder.exists()
    empty = folder.is_dir() and not any(folder.iterdir())
    raise no_corpus(str(folder), exists, used=exists and not empty)


def require_model(model: Path) -> None:
    """Refuse a folder that is no model's before torch is loaded; what else can be wrong with one,
    its loader says.
    """
    if not model.is_dir() or (model / MODEL_INDEX).is_file():
        return
    inside = model / MODEL
    remedy = f"; give {inside}" if (inside / MODEL_INDEX).is_file() else ""
    raise InputError(
        f"{model}: no {MODEL_INDEX}, so this is not a model folder written by lidit train{remedy}"
    )
