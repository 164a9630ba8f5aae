"""`lidit embed`: the LLM states of every caption of a corpus, once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.support.options import node_labels
from jobs.support.start import run
from lidit.config import EncoderSettings, PoolSettings
from lidit.config.shipped import load_encoder_settings

if TYPE_CHECKING:
    from pipelines.corpus.embed import EmbedSummary


def command(
    corpus: Annotated[str, typer.Argument(help="Corpus folder written by `lidit ingest`.")],
    encoder: Annotated[list[str], typer.Option(help="Encoder file or shipped name; repeat for several LLMs.")],
    setting: Annotated[list[str] | None, typer.Option("--set", help="An encoder setting: layer=-2")] = None,
    actors: Annotated[int, typer.Option(min=1, help="Encoder actors.")] = 1,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of an actor.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of an actor.")] = 0,
    token_budget: Annotated[int, typer.Option(min=1, help="Padded tokens of one forward pass.")] = 8192,
    node_label: Annotated[list[str] | None, typer.Option(help="Ray node label to ask for: lidit/pool=large")] = None,
) -> None:
    """Compute and store the states of one or several LLMs for every distinct caption, with Ray Data and actor pools.

    **Reads** CORPUS/captions. **Writes** one text family per LLM, CORPUS/text/NAME-FINGERPRINT. The same command again
    computes only missing units, and loads no model when there are none.

    **Example:** `lidit embed corpus --encoder smollm2 --encoder gemma3`
    """
    labels = node_labels(node_label)
    pool = PoolSettings(actors=actors, cpus=cpus, gpus=gpus, token_budget=token_budget, label_selector=labels)
    for settings in [load_encoder_settings(name, setting) for name in encoder]:
        embed(corpus, settings, pool)


def embed(corpus: str, settings: EncoderSettings, pool: PoolSettings) -> None:
    """Compute one family with a progress bar and say what came of it, cut captions included."""
    from pipelines.corpus.embed import run_embed
    from pipelines.runtime.progress import ProgressBar

    with ProgressBar(f"embed {settings.name}", None, "captions") as progress:
        made = run_embed(corpus, settings, pool, progress)
    show(corpus, made)


def show(corpus: str, made: EmbedSummary) -> None:
    """What came of one family."""
    state = f"{made.computed_units} computed in {made.seconds:.0f} s" if made.computed_units else "already there"
    print(
        f"{corpus}/text/{made.directory}: {made.captions} captions, {made.tokens} tokens, {made.units} units, {state}"
    )
    if made.truncated:
        print(f"  {made.truncated} captions were cut to {made.max_tokens} tokens")
    if made.control:
        print(f"  {made.control} captions spell control words of the tokenizer; they were read as text")
    for directory, fields in made.relatives.items():
        print(f"  another family than {directory}: {'; '.join(fields)}")


if __name__ == "__main__":
    run(command)
