"""`lidit status`: where one training stands, and how it goes on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.support.run_folders import RECIPE, read_json, required_run
from jobs.support.start import run

LOSS = "train/loss"


def command(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, OUTPUT/NAME of `lidit train`.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of lines.")
    ] = False,
) -> None:
    """Show a run's state, step, last loss and checkpoint, its MLflow page, and the command that
    goes on with it.

    **Reads** the run folder and the tracker. **Writes** nothing.

    **Example:** `lidit status runs/demo`
    """
    found = required_run(run_folder)
    facts = {**asdict(found), **tracked(run_folder)}
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    print(f"{found.name}: {found.state}, step {found.step:,} of {found.steps:,}")
    loss = facts["loss"]
    lines = {
        "loss": None if loss is None else f"{loss[1]:.4f} at step {loss[0]:,}",
        "checkpoint": found.checkpoint,
        "model": str(run_folder / "model") if (run_folder / "model").is_dir() else None,
        "mlflow": facts["mlflow"],
        "resume": None if found.state == "finished" else found.resume,
    }
    for name, text in lines.items():
        if text is not None:
            print(f"  {name:<10} {text}")


def tracked(run_folder: Path) -> dict[str, Any]:
    """What the tracker knows: the last (step, loss), the run's id, and where it is shown; None
    where it is silent.
    """
    from pipelines.tracking import curves, open_command, read_run_id, store_uri
    from pipelines.tracking.store import sqlite_file

    run_id = read_run_id(run_folder)
    settings = read_json(run_folder / RECIPE).get("tracking") or {}
    uri = store_uri(settings.get("uri"), run_folder.resolve().parent)
    file = sqlite_file(uri)
    there = file is None or file.is_file()  # MLflow would make a store where there is none
    points = curves(uri, run_id, [LOSS]).get(LOSS, []) if run_id and there else []
    shown = f"{open_command(uri)}  # run {run_id}" if run_id else None
    return {"loss": points[-1] if points else None, "run_id": run_id or None, "mlflow": shown}


if __name__ == "__main__":
    run(command)
