"""`lidit evaluate`: how well a model follows prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.start import run
from lidit.config import EvaluateSettings, PoolSettings
from lidit.errors import InputError
from lidit.settings import apply_overrides, validate

if TYPE_CHECKING:
    from pipelines.evaluate import SceneScores


def command(
    model: Annotated[Path, typer.Argument(help="Model folder written by `lidit train`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: per_tag=24 layout=simple")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: beside the model.")] = None,
    binding: Annotated[
        bool, typer.Option("--binding", help="Binding and relation accuracy instead of images.")
    ] = False,
    suite: Annotated[str | None, typer.Option(help="geneval, t2i-compbench, dpg-bench; segments4, segments8.")] = None,
    prompts: Annotated[list[Path] | None, typer.Option(help="The suite's prompt file; one per category.")] = None,
    parse: Annotated[Path | None, typer.Option(help="What the suite's scorer wrote: sum it up.")] = None,
    csv: Annotated[Path | None, typer.Option(help="dpg_bench.csv, for DPG-Bench's categories.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers that draw a suite.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of a worker.")] = 0,
) -> None:
    """Draw the scene benchmark's prompts and score the images by program, lax and strict, beside the chance floor.

    With --binding: is the loss higher under a wrong caption? With --suite and --prompts: images in the layout the
    official scorer reads. With --suite and --parse: the official aggregates. The same command goes on where it stopped.

    **Reads** a model folder; loads its LLMs. **Writes** scores.md, scores.json, results.jsonl (GenEval's format),
    grid.png, images/ (GenEval's layout; those of an earlier evaluation are replaced) and, for list prompts,
    positions.png; binding.md and binding.json; or the suite's folders. And an MLflow run, except for --prompts.

    **Example:** `lidit evaluate runs/demo/model per_tag=24`
    """
    settings = validate(EvaluateSettings, apply_overrides({}, overrides or []), "lidit evaluate")
    folder = out or model.resolve().parent / "evaluation"
    _check(binding, suite, prompts, parse, csv)
    if suite:
        pool = PoolSettings(actors=workers, gpus=gpus)
        _official(model, suite, prompts or [], parse, csv, pool, settings.batch_size, folder)
        return
    from pipelines.evaluate import evaluate_binding, evaluate_scenes
    from pipelines.models import tracking_of

    evaluate = evaluate_binding if binding else evaluate_scenes
    show(evaluate(model, settings, tracking_of(model), folder))


def show(scores: SceneScores) -> None:
    """What came of an evaluation."""
    print(scores.table)
    print(f"{scores.folder}: {'written' if scores.computed else 'already there, for this model and these settings'}")


def _check(binding: bool, suite: str | None, prompts: list[Path] | None, parse: Path | None, csv: Path | None) -> None:
    if suite is None and (prompts or parse or csv):
        raise InputError(
            "--prompts, --parse and --csv belong to --suite geneval, t2i-compbench, dpg-bench, segments4 or segments8"
        )
    if suite and binding:
        raise InputError("--binding and --suite are two jobs: run them one after the other")
    if suite and not (prompts or parse):
        raise InputError(f"--suite {suite}: give --prompts FILE to draw, or --parse RESULTS to sum up")
    if csv and not parse:
        raise InputError("--csv is read together with --parse, the scorer's results")


def _official(
    model: Path,
    suite: str,
    prompts: list[Path],
    parse: Path | None,
    csv: Path | None,
    pool: PoolSettings,
    batch_size: int,
    folder: Path,
) -> None:
    from pipelines.models import tracking_of
    from pipelines.suites import draw_suite, track_results

    if prompts:
        made = draw_suite(model, suite, prompts, folder / suite, pool, batch_size)
        state = f"{made.drawn} drawn in {made.seconds:.0f} s" if made.drawn else "already there"
        print(f"{made.folder}: {made.images} files, {state}")
    if parse:
        scores = track_results(model, suite, parse, csv, tracking_of(model), folder)
        print("\n".join([scores.table, *scores.notes]))


if __name__ == "__main__":
    run(command)
