"""`lidit ablate`: which parts of the model matter, with intervals, beside the paper's tables."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.support.start import run


def command(
    recipe: Annotated[
        str, typer.Argument(help="Ablation recipe, or the name of a shipped one: ablate-2cores.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: recipe.train.steps=50")
    ] = None,
) -> None:
    """Train every arm of a grid with every seed on one corpus, judge each on scenes it has never
    seen, write it up.

    **Reads** the recipe; makes its own scenes and corpus. **Writes** OUTPUT/NAME: scenes,
    arms/ARM-seedN/result.json, report/README.md with plots, and an MLflow run with one run per arm
    below it. The same command again trains only the arms without a result; the report is written
    anew after each one.

    **Example:** `lidit ablate ablate-2cores`
    """
    from lidit.config.shipped import load_ablation

    checked = load_ablation(recipe, overrides)
    from pipelines.ablation.ablate import run_ablation
    from pipelines.tracking import open_command

    made = run_ablation(checked)
    print(f"{made.page}: {made.trained} arms trained, {made.found} already there")
    print(f"compare    {open_command(made.tracking_uri)}")


if __name__ == "__main__":
    run(command)
