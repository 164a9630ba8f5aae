"""`lidit run`: a recipe from its sources to its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jobs import embed, evaluate, ingest, latents, train
from jobs.support.dry_run import stages
from jobs.support.start import run

if TYPE_CHECKING:
    from lidit.config import Stage


def command(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: train.steps=200")
    ] = None,
    until: Annotated[
        Literal["ingest", "embed", "latents", "train", "evaluate"],
        typer.Option(help="Last stage to do."),
    ] = "evaluate",
    allow_drift: Annotated[
        bool, typer.Option(help="Continue training although settings or data changed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is left of each stage; do nothing.")
    ] = False,
) -> None:
    """Ingest, embed with every encoder of the recipe, latents, train, evaluate: whatever of it is
    missing.

    Encoders run side by side where processors and cards allow. **Reads** the recipe and its
    sources. **Writes** the corpus and OUTPUT/NAME. The same command after a crash goes on where it
    stopped; when everything is there it does nothing.

    **Example:** `lidit run recipe.yaml train.steps=1000 --until train`
    """
    from lidit.config.shipped import load_recipe

    checked = load_recipe(recipe, overrides)
    if dry_run:
        for stage, left in stages(checked, until):
            print(f"{stage}: {left}")
        return
    from pipelines.chain import run_chain

    run_chain(checked, showing(checked.corpus), until, allow_drift)


def showing(corpus: str) -> Callable[[Stage, Any], None]:
    """Prints what came of each stage of a chain."""
    show: dict[Stage, Callable[[Any], None]] = {
        "ingest": lambda made: ingest.show(corpus, made),
        "embed": lambda made: embed.show(corpus, made),
        "latents": lambda made: latents.show(corpus, made),
        "train": train.show,
        "evaluate": evaluate.show,
    }
    return lambda stage, made: show[stage](made)


if __name__ == "__main__":
    run(command)
