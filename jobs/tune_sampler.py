"""`lidit tune-sampler`: fewest evaluations of the network for a model's best pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.support.run_folders import require_model
from jobs.support.start import run


def command(
    model: Annotated[
        Path, typer.Argument(help="Model folder written by `lidit train` or `lidit distill`.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings to change: evaluations=50000 steps=[4,8,25]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: beside the model.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of a table.")
    ] = False,
) -> None:
    """Find steps, scheduler, guidance scale and guidance interval by the scene benchmark's strict
    score, on a budget.

    Candidates draw the same prompts from the same seeds, round by round; whichever another one
    beats surely, for no more evaluations, leaves. The prompts are not those of `lidit evaluate`.

    **Reads** a model folder; loads its LLMs. **Writes** tune-sampler.md, tune-sampler.json and
    tune-sampler.png, evaluations against score with 95 % intervals, and an MLflow run.

    **Example:** `lidit tune-sampler runs/demo/model evaluations=300000`
    """
    require_model(model)
    from lidit.config.settings import apply_overrides, validate
    from lidit.config.tune import TuneSettings

    settings = validate(TuneSettings, apply_overrides({}, overrides or []), "lidit tune-sampler")
    from pipelines.evaluation.models import tracking_of
    from pipelines.evaluation.tune import PLOT, tune_sampler

    found = tune_sampler(
        model, settings, tracking_of(model), out or model.resolve().parent / "tuning"
    )
    if as_json:
        print(
            json.dumps(
                asdict(found) | {"sampler": found.sampler.model_dump(mode="json")},
                indent=1,
                default=str,
            )
        )
        return
    sampler = found.sampler
    print(found.table)
    print(
        f"{found.folder / PLOT}: "
        f"{'written' if found.computed else 'already there, for this model and these settings'}"
    )
    low, high = sampler.guidance_interval
    print(
        f"check      lidit evaluate {model} sampler.steps={sampler.steps} "
        f"sampler.scheduler={sampler.scheduler} "
        f"sampler.guidance_scale={sampler.guidance_scale:g} "
        f"'sampler.guidance_interval=[{low:g}, {high:g}]'"
    )


if __name__ == "__main__":
    run(command)
