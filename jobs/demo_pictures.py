"""`lidit demo-pictures`: the whole system on real pictures, end to end, on two CPU cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs import train_codec
from jobs.evaluate import show_held_out
from jobs.run import showing
from jobs.support.start import run


def command(
    folder: Annotated[Path, typer.Option("--folder", "--out", help="All is written here.")] = Path(
        "demo-pictures"
    ),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: train.steps=200")
    ] = None,
    packages: Annotated[
        Path | None, typer.Option(help="Folder with packages fetched before; filled.")
    ] = None,
    codec_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the codec's training.")
    ] = None,
) -> None:
    """Fetch emoji, ingest, train a codec, embed with two real LLMs, latents, train, draw held-out
    captions.

    **Writes** FOLDER: emoji (with their licences), corpus, runs/pictures-codec, runs/pictures
    (model, pictures, scores) and runs/mlflow.db. The same command again does only what is missing.

    **Example:** `lidit demo-pictures --folder demo-pictures`
    """
    from lidit.config.shipped import load_recipe
    from lidit.datasets import SETS, write_picture_set
    from pipelines.chain import run_chain
    from pipelines.evaluation.held_out import evaluate_held_out
    from pipelines.runtime.progress import ProgressBar

    emoji, runs, corpus = folder / "emoji", folder / "runs", folder / "corpus"
    with ProgressBar("pictures emoji", None, "packages") as progress:
        write_picture_set(SETS["emoji"], emoji, packages=packages, progress=progress)
    recipe = load_recipe(
        "pictures",
        [
            f"output={runs}",
            f"corpus={corpus}",
            f"sources=['{emoji / 'train' / '0000[0-3].tar'}']",
            f"codec.model={runs / 'pictures-codec' / 'model'}",
            *(overrides or []),
        ],
    )
    run_chain(recipe, showing(recipe.corpus), until="ingest")
    steps = [] if codec_steps is None else [f"train.steps={codec_steps}"]
    train_codec.command(
        "codec-small", [f"output={runs}", f"corpus={corpus}", "name=pictures-codec", *steps]
    )
    result = run_chain(recipe, showing(recipe.corpus), until="train")["train"]
    held_out = [str(emoji / "held_out")]
    show_held_out(
        evaluate_held_out(
            result.model, held_out, recipe.evaluate, recipe.tracking, recipe.run_folder / "held-out"
        )
    )
    print(f"licences   {emoji / 'ATTRIBUTION.md'}")
    print(f"draw       lidit sample {result.model} --prompt 'red apple, Noto style'")


if __name__ == "__main__":
    run(command)
