"""`lidit guard`: what looks at prompts before they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.support.start import HELP_OPTIONS

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", context_settings=HELP_OPTIONS)


@app.callback()
def guard() -> None:
    """Train the guard that refuses prompts by what a model's LLMs make of them, and try guards out.

    **Reads** a labelled file and a model folder; loads its LLMs. **Writes** the guard's file.

    **Example:** `lidit guard train labelled.jsonl --model runs/demo/model`
    """


@app.command("train")
def train(
    file: Annotated[
        Path, typer.Argument(help='JSON lines: {"prompt": text, "refuse": true or false}.')
    ],
    model: Annotated[Path, typer.Option(help="Model folder written by `lidit train`.")],
    out: Annotated[Path, typer.Option(help="File for the guard.")] = Path("guard.safetensors"),
    blocked: Annotated[
        float,
        typer.Option(min=0.0001, max=0.5, help="Share of harmless prompts that may be refused."),
    ] = 0.01,
) -> None:
    """Train a linear probe on the LLM states of labelled prompts. A quarter of them is held out to
    measure on.

    **Reads** FILE and the model; loads its LLMs. **Writes** OUT.

    **Example:** `lidit guard train labelled.jsonl --model runs/demo/model --out guard.safetensors`
    """
    from lidit.pipeline import LIDiTPipeline
    from lidit.serving.guards.training import read_labelled, train_probe

    labelled = read_labelled(file)
    pipeline = LIDiTPipeline.from_pretrained(model)
    trained = train_probe(labelled, pipeline.encoders, blocked)
    trained.probe.save(out)
    print(
        f"{out}: trained on {trained.trained_on} prompts, threshold {trained.probe.threshold:.3f}"
    )
    print("on prompts that were held out, with 95 % intervals:")
    print(f"  to be refused and refused:  {trained.refused}")
    print(f"  harmless and refused:       {trained.blocked}")
    print(f"  separation (AUC, 0.5 is chance): {trained.separation:.3f}")


@app.command("words")
def words(
    words: Annotated[Path, typer.Argument(help="List of words, one word or phrase a line.")],
    prompts: Annotated[Path, typer.Argument(help="Prompts to try it on, one a line.")],
) -> None:
    """Try a list of words on prompts: how many it refuses and suspects, and the numbers of their
    lines.

    **Reads** both files. **Writes** nothing.

    **Example:** `lidit guard words words.txt prompts.txt`
    """
    from lidit.errors import InputError
    from lidit.serving.guards.words import FOUND, SUSPECTED, WordList

    guard = WordList(words)
    try:
        lines = [line for line in prompts.read_text("utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise InputError(
            f"{prompts}: is not UTF-8; give a text file with one prompt a line"
        ) from None
    scores = guard.scores(lines)
    for state, score in (("refused", FOUND), ("suspected", SUSPECTED)):
        numbers = [str(number) for number, found in enumerate(scores, 1) if found == score]
        more = " ..." if len(numbers) > 20 else ""
        print(f"{state}: {len(numbers)} of {len(lines)}  {', '.join(numbers[:20])}{more}".rstrip())
