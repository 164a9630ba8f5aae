"""`lidit demo`: the whole system, end to end, on two CPU cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.embed import embed
from jobs.ingest import ingest
from jobs.recipe import load_recipe
from jobs.start import run

SCENES, SIZE, SEED = 8000, 32, 0
LOGICAL_CPUS = 6  # of the embedded Ray: two trainers, their driver, a reader and an encoder may be alive together


def command(
    folder: Annotated[Path, typer.Option(help="Everything is written below this folder.")] = Path("demo"),
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: train.steps=200")] = None,
    count: Annotated[int, typer.Option(min=100, help="Number of scenes.")] = SCENES,
) -> None:
    """Scenes, ingest, embed with two real LLMs, train, sample, evaluate, on an embedded Ray and a local MLflow.

    **Writes** FOLDER: scenes, corpus, runs/demo (model, pictures, scores) and runs/mlflow.db. The same command again
    does only what is missing.

    **Example:** `lidit demo --folder demo`
    """
    recipe = load_recipe(
        "demo",
        [
            f"output={folder / 'runs'}",
            f"corpus={folder / 'corpus'}",
            f"sources=[{folder / 'scenes'}]",
            *(overrides or []),
        ],
    )
    from jobs import scenes
    from pipelines.cluster import connect
    from pipelines.evaluate import evaluate_scenes
    from pipelines.fit import run_fit
    from pipelines.latents import run_latents
    from pipelines.tracking import open_command

    scenes.command(folder / "scenes", count, SIZE, SEED, recipe.ingest.unit_samples, recipe.evaluate.layout)
    connect(cpus=LOGICAL_CPUS)
    ingest(list(recipe.sources), recipe.corpus, recipe.ingest)
    for encoder in recipe.encoders:
        embed(recipe.corpus, encoder, recipe.pool)
    run_latents(recipe.corpus, recipe.codec, recipe.pool)
    result = run_fit(recipe)
    scores = evaluate_scenes(result.model, recipe.evaluate, recipe.tracking, recipe.run_folder / "evaluation")
    print(scores.table)
    print(f"\nmodel      {result.model}")
    print(f"pictures   {scores.folder / 'grid.png'}")
    print(f"draw       lidit sample {result.model} --prompt 'a red circle left of a blue square'")
    print(f"compare    {open_command(result.tracking_uri)}")


if __name__ == "__main__":
    run(command)
