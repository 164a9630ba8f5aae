"""`lidit probe`: what the states of a prompt hold, before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.support.run_folders import model_folder
from jobs.support.start import run
from lidit.errors import InputError


def command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Encoder files or shipped names; or a corpus, for its LLMs. Default: the model's."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the report; default: runs/probe, or probe in the run."),
    ] = None,
    style: Annotated[
        list[str] | None, typer.Option(help="Caption style; repeat for several.")
    ] = None,
    captions: Annotated[
        int, typer.Option("--captions", "--count", min=8, help="Captions per style.")
    ] = 320,
    model: Annotated[
        Path | None,
        typer.Option(help="Run or model folder: the probe's MLflow run goes below its training's."),
    ] = None,
) -> None:
    """Can the colour of a segment be read at its noun, at later tokens, at the last one? Per block,
    causal and with the mask removed, with and without the instruction; and norms and outlier
    channels.

    **Reads** the LLMs' files. **Writes** OUT/README.md with its plots, and an MLflow run.

    With --model the run goes below that training's, as evaluations do.

    **Example:** `lidit probe smollm2 gemma3 --out runs/probe`
    """
    if not sources and model is None:
        raise InputError("lidit probe: name the LLMs, or the model that reads prompts with them")
    folder = None if model is None else model_folder(model)
    from lidit.config import TrackingSettings
    from lidit.config.shipped import load_encoder_settings
    from lidit.store import Corpus
    from pipelines.evaluation.models import tracking_of
    from pipelines.evaluation.probe import corpus_encoders, model_encoders, run_probe

    encoders = model_encoders(folder) if folder and not sources else []
    for source in sources or []:
        if Path(source).is_dir():
            encoders += corpus_encoders(Corpus.open(source))
        else:
            encoders.append(load_encoder_settings(source))
    tracking = tracking_of(folder) if folder else TrackingSettings()
    out = out or (folder.resolve().parent / "probe" if folder else Path("runs/probe"))
    print(run_probe(encoders, style or ["bare", "clauses"], captions, out, tracking, folder))


if __name__ == "__main__":
    run(command)
