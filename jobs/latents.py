"""`lidit latents`: the images of a corpus as a codec's latents, once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.support.options import has_tracker, node_labels
from jobs.support.start import run
from lidit.errors import InputError

if TYPE_CHECKING:
    from lidit.config import CodecSettings
    from pipelines.corpus.latents import LatentsSummary


def command(
    corpus: Annotated[str, typer.Argument(help="Corpus folder written by `lidit ingest`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Codec settings: storage=bfloat16")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="pixels, or hub id or folder of a diffusers autoencoder.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the family; default: pixels or the model's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub id.")] = None,
    recipe: Annotated[str | None, typer.Option(help="The codec of this recipe instead.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="The same as a setting without it.")
    ] = None,
    actors: Annotated[int, typer.Option(min=1, help="Encoder actors.")] = 1,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of an actor.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of an actor.")] = 0,
    node_label: Annotated[
        list[str] | None, typer.Option(help="Ray node label to ask for: lidit/pool=large")
    ] = None,
) -> None:
    """Encode every image of a corpus with an autoencoder, in batches per aspect bucket, with a Ray
    actor pool.

    **Reads** CORPUS/samples and the images in their sources. **Writes**
    CORPUS/latents/NAME-FINGERPRINT. A training finds latents by the codec's settings, so take them
    from its recipe where they are not the defaults.

    **Example:** `lidit latents corpus --recipe lidit-1b --actors 8 --gpus 1`
    """
    from lidit.config import PoolSettings

    settings = codec_settings(codec, name, revision, recipe, [*(overrides or []), *(setting or [])])
    pool = PoolSettings(actors=actors, cpus=cpus, gpus=gpus, label_selector=node_labels(node_label))
    from pipelines.corpus.latents import run_latents
    from pipelines.runtime.progress import ProgressBar

    with ProgressBar(f"latents {settings.name}", None, "units") as progress:
        made = run_latents(corpus, settings, pool, progress)
    show(corpus, made)
    if has_tracker():
        from pipelines.corpus.tracked import track_latents

        track_latents(corpus, settings, made)


def codec_settings(
    codec: str | None,
    name: str | None,
    revision: str | None,
    recipe: str | None,
    overrides: list[str],
) -> CodecSettings:
    """The codec that the options name. InputError for a recipe beside a codec, and for settings
    that are none.
    """
    from lidit.config import CodecSettings
    from lidit.config.settings import apply_overrides, validate
    from lidit.config.shipped import load_recipe

    given = {"name": name, "revision": revision, "model": None if codec == "pixels" else codec}
    tree = {key: value for key, value in given.items() if value}
    if recipe and (tree or codec):
        raise InputError(
            "--recipe names the codec: leave --codec, --name and --revision out, or change "
            "it with settings, such as storage=bfloat16"
        )
    if recipe:
        tree = load_recipe(recipe).codec.model_dump()
    elif codec and not name:
        tree["name"] = codec.rstrip("/").rsplit("/", 1)[-1].lower()
    return validate(CodecSettings, apply_overrides(tree, overrides), "lidit latents")


def show(corpus: str, made: LatentsSummary) -> None:
    """What came of one family."""
    state = (
        f"{made.computed_units} computed in {made.seconds:.0f} s"
        if made.computed_units
        else "already there"
    )
    print(f"{corpus}/latents/{made.directory}: {made.images} images, {made.units} units, {state}")


if __name__ == "__main__":
    run(command)
