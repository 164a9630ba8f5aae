"""`lidit train`: fit LI-DiT to a corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.support.start import run

if TYPE_CHECKING:
    from pipelines.training.driver import TrainResult


def command(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: train.steps=200")
    ] = None,
    allow_drift: Annotated[
        bool, typer.Option(help="Continue although settings or data changed.")
    ] = False,
) -> None:
    """Train LI-DiT on the states and latents of a corpus, with Ray Train and DeepSpeed.

    **Reads** the recipe, the corpus it names, its text families and its latents. **Writes**
    OUTPUT/NAME: checkpoints, sample grids, `model/` (a diffusers-style folder), and an MLflow run.
    The same command after a crash goes on from the last checkpoint; after the last step it does
    nothing.

    **Example:** `lidit train demo train.steps=200 engine.workers=1`
    """
    from lidit.config.shipped import load_recipe

    checked = load_recipe(recipe, overrides)
    from pipelines.training.train import train

    show(train(checked, allow_drift))


def show(result: TrainResult) -> None:
    """What came of a training."""
    print(
        f"{result.model}: {'trained to' if result.trained else 'already trained to'} step "
        f"{result.step}"
    )


if __name__ == "__main__":
    run(command)
