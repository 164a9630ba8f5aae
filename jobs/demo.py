"""`lidit demo`: the whole system, end to end, on two CPU cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs import scenes
from jobs.run import showing
from jobs.support.start import run

SCENES, SIZE, SEED = 8000, 32, 0


def command(
    folder: Annotated[Path, typer.Option("--folder", "--out", help="All is written here.")] = Path(
        "demo"
    ),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: train.steps=200")
    ] = None,
    count: Annotated[int, typer.Option(min=100, help="Number of scenes.")] = SCENES,
) -> None:
    """Scenes, ingest, embed with two real LLMs, train, sample, evaluate, on an embedded Ray and a
    local MLflow.

    **Writes** FOLDER: scenes, corpus, runs/demo (model, pictures, scores) and runs/mlflow.db. The
    same command again does only what is missing.

    **Example:** `lidit demo --folder demo`
    """
    from lidit.config.shipped import load_recipe

    recipe = load_recipe(
        "demo",
        [
            f"output={folder / 'runs'}",
            f"corpus={folder / 'corpus'}",
            f"sources=[{folder / 'scenes'}]",
            *(overrides or []),
        ],
    )
    from pipelines.chain import run_chain
    from pipelines.tracking import open_command

    scenes.command(
        folder / "scenes", count, SIZE, SEED, recipe.ingest.unit_samples, recipe.evaluate.layout
    )
    made = run_chain(recipe, showing(recipe.corpus))
    result, scores = made["train"], made["evaluate"]
    print(f"\nmodel      {result.model}")
    print(f"pictures   {scores.folder / 'grid.png'}")
    print(f"draw       lidit sample {result.model} --prompt 'a red circle left of a blue square'")
    print(f"compare    {open_command(result.tracking_uri)}")
    print(f"serve      lidit serve {result.model}")


if __name__ == "__main__":
    run(command)
