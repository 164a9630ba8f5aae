"""`lidit probe`: what the states of a prompt hold, before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.support.start import run


def command(
    sources: Annotated[
        list[str], typer.Argument(help="Encoder files or shipped names; or a corpus, for its LLMs.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("runs/probe"),
    style: Annotated[
        list[str] | None, typer.Option(help="Caption style; repeat for several.")
    ] = None,
    captions: Annotated[
        int, typer.Option("--captions", "--count", min=8, help="Captions per style.")
    ] = 320,
) -> None:
    """Can the colour of a segment be read at its noun, at later tokens, at the last one? Per block,
    causal and with the mask removed, with and without the instruction; and norms and outlier
    channels.

    **Reads** the LLMs' files. **Writes** OUT/README.md with its plots, and an MLflow run.

    **Example:** `lidit probe smollm2 gemma3 --out runs/probe`
    """
    from lidit.config import TrackingSettings
    from lidit.config.shipped import load_encoder_settings
    from lidit.store import Corpus
    from pipelines.evaluation.probe import corpus_encoders, run_probe

    encoders = []
    for source in sources:
        if Path(source).is_dir():
            encoders += corpus_encoders(Corpus.open(source))
        else:
            encoders.append(load_encoder_settings(source))
    print(run_probe(encoders, style or ["bare", "clauses"], captions, out, TrackingSettings()))


if __name__ == "__main__":
    run(command)
