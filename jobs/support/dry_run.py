"""What a command would do: read from what lies on disk, without Ray, and without a
model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jobs.support.run_folders import read_json, read_run
from lidit.errors import InputError

if TYPE_CHECKING:
    from lidit.config import EncoderSettings, PoolSettings, Recipe
    from lidit.store import Corpus


def stages(recipe: Recipe, until: str) -> Iterator[tuple[str, str]]:
    """Each stage of `lidit run` up to `until`, and what of it is left to do."""
    from lidit.codecs import codec_spec
    from lidit.store import Corpus

    try:
        corpus: Corpus | None = Corpus.open(recipe.corpus)
    except InputError:
        corpus = None
    yield "ingest", "finished" if corpus else f"to do, into {recipe.corpus}"
    if until == "ingest":
        return
    for encoder in recipe.encoders:
        left = (
            embedding(corpus, encoder, recipe.pool_of(encoder.name))
            if corpus
            else "to do, after ingest"
        )
        if recipe.online and left.startswith("to do"):
            left = "beside training, as it needs states"
        yield f"embed {encoder.name}", left
    if until == "embed":
        return
    spec = codec_spec(recipe.codec, "cuda" if recipe.pool.gpus else "cpu") if corpus else {}
    left = family(corpus, "latents", recipe.codec.name, spec) if corpus else "to do, after ingest"
    yield f"latents {recipe.codec.name}", left
    if until == "latents":
        return
    yield "train", training(recipe)
    if until == "evaluate":
        scores = recipe.run_folder / "evaluation" / "scores.json"
        made = "there are scores; they are computed anew for another model or sampler"
        yield "evaluate", made if read_json(scores) else "to do"


def training(recipe: Recipe) -> str:
    """What is left of a recipe's training."""
    run = read_run(recipe.run_folder)
    if run is None:
        return f"to do, {recipe.train.steps:,} steps into {recipe.run_folder}"
    if run.state != "stopped":
        return f"{run.state}, step {run.step:,}"
    return f"to do, from step {run.step:,} of {recipe.train.steps:,}"


def embedding(corpus: Corpus, settings: EncoderSettings, pool: PoolSettings) -> str:
    """What is left of one encoder's family."""
    from lidit.text import resolve_encoder

    spec = resolve_encoder(settings, "cuda" if pool.gpus else "cpu")
    return family(corpus, "text", spec.name, spec.to_dict())


def family(corpus: Corpus, kind: str, name: str, spec: dict[str, Any]) -> str:
    """What is left of a family: finished, or the units and rows that are missing."""
    from lidit.store import FamilyWriter

    writer = FamilyWriter(corpus.folder.location, kind, name, spec)
    if writer.complete():
        return f"finished, {kind}/{writer.directory}"
    pending = writer.pending(clean=False)
    counts = corpus.units["captions" if kind == "text" else "samples"].to_pylist()
    rows = sum(counts[unit] for unit in pending)
    unit = "captions" if kind == "text" else "images"
    return (
        f"to do, {rows:,} {unit} in {len(pending):,} of {len(counts):,} units, into "
        f"{kind}/{writer.directory}"
    )
