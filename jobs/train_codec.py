"""`lidit train-codec`: an autoencoder of one's own images."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.support.start import run


def command(
    recipe: Annotated[
        str, typer.Argument(help="Codec recipe file, or the name of a shipped one: codec-small.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: train.steps=200")
    ] = None,
    allow_drift: Annotated[
        bool, typer.Option(help="Continue although settings or data changed.")
    ] = False,
) -> None:
    """Train an AutoencoderKL on a corpus's images, with Ray Train and DeepSpeed as `lidit train`
    does.

    **Reads** the recipe and the images of the corpus it names. **Writes** OUTPUT/NAME: checkpoints,
    reconstruction grids, `model/` (a diffusers folder with the measured scaling factor, for
    `lidit latents --codec`), an MLflow run.

    **Example:** `lidit train-codec codec-small corpus=corpus`
    """
    from lidit.config.shipped import load_codec_recipe

    checked = load_codec_recipe(recipe, overrides)
    from pipelines.training.train_codec import train_codec

    result = train_codec(checked, allow_drift)
    print(
        f"{result.model}: {'trained to' if result.trained else 'already trained to'} step "
        f"{result.step}"
    )
    print(f"use it     lidit latents {checked.corpus} --codec {result.model} --name {checked.name}")


if __name__ == "__main__":
    run(command)
