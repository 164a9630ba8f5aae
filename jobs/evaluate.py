"""`lidit evaluate`: how well a model follows prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.support.start import run
from lidit.errors import InputError

if TYPE_CHECKING:
    from pipelines.evaluation.held_out import CaptionMatch
    from pipelines.evaluation.scorecard import Scores
    from pipelines.evaluation.suites import SuiteImages

# The settings that each measure uses.
USED_BY = {
    "scenes": {"per_tag", "images_per_prompt", "layout", "tags", "seed", "batch_size", "sampler"},
    "binding": {"binding_scenes", "layout", "seed", "batch_size"},
    "pictures": {"pictures", "sampler"},
    "suite": {"batch_size", "sampler"},
}


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
    pictures: Annotated[list[str] | None, typer.Option(help="Held-out pictures with captions.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers that draw a suite; default 1.")] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of such a worker; default 0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Draw the scene benchmark's prompts and score the images by program, lax and strict, beside the chance floor.

    With --binding: is the loss higher under a wrong caption? With --pictures: is it higher under another picture's?
    With --suite and --prompts: images in the layout the official scorer reads. With --suite and --parse: the official
    aggregates. The same command goes on where it stopped. `sampler.guidance_scale=5` and its like draw otherwise than
    the model's own sampler.

    **Reads** a model folder; loads its LLMs. **Writes** scores.md, scores.json, results.jsonl (GenEval's format),
    grid.png, images/ (GenEval's layout; those of an earlier evaluation are replaced) and, for list prompts,
    positions.png; binding.md and binding.json; held-out.json and held-out.png; or the suite's folders. And an MLflow
    run, except for --prompts.

    **Example:** `lidit evaluate runs/demo/model per_tag=24`
    """
    # Refuse what does not go together, before anything is loaded.
    from lidit.config import EvaluateSettings, PoolSettings
    from lidit.config.settings import apply_overrides, validate

    settings = validate(EvaluateSettings, apply_overrides({}, overrides or []), "lidit evaluate")
    _check(binding, suite, prompts, parse, csv, pictures)
    measure = "suite" if suite else "binding" if binding else "pictures" if pictures else "scenes"
    _check_used(measure, overrides or [], {"--workers": workers, "--gpus": gpus})
    folder = out or model.resolve().parent / "evaluation"
    # One measure per call, imported only when it is asked for.
    from pipelines.evaluation.models import tracking_of

    if suite and prompts:
        from pipelines.evaluation.suites import sample_suite

        pool = PoolSettings(actors=workers or 1, gpus=gpus or 0)
        made = sample_suite(model, suite, prompts, settings, pool, folder / suite)
        _print_json(asdict(made)) if as_json else show_suite(made)
    if suite and parse:
        from pipelines.evaluation.suites import track_results

        official = track_results(model, suite, parse, csv, tracking_of(model), folder)
        if as_json:
            _print_json({"metrics": official.metrics, "notes": official.notes})
        else:
            print("\n".join([official.table, *official.notes]))
    if measure == "binding":
        from pipelines.evaluation.binding import evaluate_binding

        scores = evaluate_binding(model, settings, tracking_of(model), folder)
        _print_json(asdict(scores)) if as_json else show(scores)
    if measure == "scenes":
        from pipelines.evaluation.scenes import evaluate_scenes

        scores = evaluate_scenes(model, settings, tracking_of(model), folder)
        _print_json(asdict(scores)) if as_json else show(scores)
    if pictures:
        from pipelines.evaluation.held_out import evaluate_held_out

        match = evaluate_held_out(model, pictures, settings, tracking_of(model), folder)
        _print_json(asdict(match)) if as_json else show_held_out(match)


def _print_json(facts: dict[str, Any]) -> None:
    """A result without the table that people read; folders as text."""
    print(json.dumps({key: value for key, value in facts.items() if key != "table"}, indent=1, default=str))


def show(scores: Scores) -> None:
    """Print an evaluation's table and where its files are."""
    print(scores.table)
    print(f"{scores.folder}: {'written' if scores.computed else 'already there, for this model and these settings'}")


def show_held_out(match: CaptionMatch) -> None:
    of = f"{match.pictures} pictures" + (f" of {match.motifs} motifs" if match.motifs < match.pictures else "")
    print(f"held-out pictures that prefer their own caption: {match.preference} of {of}, chance 0.5")
    print(f"{match.grid}: {'written' if match.computed else 'already there, for this model and these pictures'}")


def show_suite(made: SuiteImages) -> None:
    state = f"{made.sampled} drawn in {made.seconds:.0f} s" if made.sampled else "already there"
    print(f"{made.folder}: {made.images} files, {state}")


def _check_used(measure: str, overrides: list[str], options: Mapping[str, object]) -> None:
    """Refuse settings and options that this measure does not use: whoever gives one expects it to matter."""
    for word in overrides:
        section = word.partition("=")[0].partition(".")[0]
        if section not in USED_BY[measure]:
            raise InputError(f"{word}: not used by this measure; it takes {', '.join(sorted(USED_BY[measure]))}")
    for option, value in options.items():
        if value is not None and measure != "suite":
            raise InputError(f"{option} belongs to --suite, whose images several workers draw; all else runs here")


def _check(
    binding: bool,
    suite: str | None,
    prompts: list[Path] | None,
    parse: Path | None,
    csv: Path | None,
    pictures: list[str] | None,
) -> None:
    if pictures and (binding or suite):
        raise InputError("--pictures, --binding and --suite are three jobs: run them one after the other")
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


if __name__ == "__main__":
    run(command)
