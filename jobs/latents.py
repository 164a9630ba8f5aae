"""`lidit latents`: the images of a corpus as a codec's latents, once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.start import run

if TYPE_CHECKING:
    from pipelines.latents import LatentsSummary


def command(
    corpus: Annotated[str, typer.Argument(help="Corpus folder written by `lidit ingest`.")],
    codec: Annotated[str, typer.Option(help="pixels, or hub id or folder of a diffusers autoencoder.")] = "pixels",
    name: Annotated[str | None, typer.Option(help="Name of the family; default: pixels or the model's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub id.")] = None,
    actors: Annotated[int, typer.Option(min=1, help="Encoder actors.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of an actor.")] = 0,
) -> None:
    """Encode every image of a corpus with an autoencoder, in batches per aspect bucket, with a Ray actor pool.

    **Reads** CORPUS/samples and the images in their sources. **Writes** CORPUS/latents/NAME-FINGERPRINT.

    **Example:** `lidit latents corpus --codec pixels`
    """
    from lidit.config import CodecSettings, PoolSettings
    from lidit.settings import validate

    tree = {"name": name or codec.rstrip("/").rsplit("/", 1)[-1].lower(), "revision": revision}
    tree |= {} if codec == "pixels" else {"model": codec}
    settings = validate(CodecSettings, tree, "lidit latents")
    from pipelines.latents import run_latents

    show(corpus, run_latents(corpus, settings, PoolSettings(actors=actors, gpus=gpus)))


def show(corpus: str, made: LatentsSummary) -> None:
    """What came of one family."""
    state = f"{made.computed_units} computed in {made.seconds:.0f} s" if made.computed_units else "already there"
    print(f"{corpus}/latents/{made.directory}: {made.images} images, {made.units} units, {state}")


if __name__ == "__main__":
    run(command)
