"""`lidit evaluate`: how well a model follows prompts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from jobs.support.options import apart
from jobs.support.run_folders import require_model
from jobs.support.start import HELP_OPTIONS, enter
from lidit.errors import InputError

if TYPE_CHECKING:
    from lidit.config import EvaluateSettings
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
SUITES = "geneval, t2i-compbench, dpg-bench; segments4, segments8."
WITHOUT_A_NAME = "model"  # the command behind `lidit evaluate MODEL`


Model = Annotated[Path, typer.Argument(help="Model folder written by `lidit train`.")]
Settings = Annotated[
    list[str] | None, typer.Argument(help="Settings to change: per_tag=24 layout=simple")
]
Out = Annotated[
    Path | None, typer.Option(help="Folder for the results; default: beside the model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


class Measures(TyperGroup):
    """Commands by what they measure; a first word that is none of them is today's form,
    `lidit evaluate MODEL`.
    """

    def parse_args(self, context: Any, words: list[str]) -> Any:
        first = next(iter(words), None)
        if (
            first is not None
            and first not in self.commands
            and first not in HELP_OPTIONS["help_option_names"]
        ):
            words = [WITHOUT_A_NAME, *words]
        return super().parse_args(context, words)


app = typer.Typer(
    cls=Measures, no_args_is_help=True, rich_markup_mode="markdown", context_settings=HELP_OPTIONS
)


@app.callback()
def measures() -> None:
    """Measure how well a model follows prompts: scenes judged by program, binding, public suites,
    held-out pictures.

    `lidit evaluate MODEL` is `lidit evaluate scenes MODEL`. **Reads** a model folder; loads its
    LLMs. **Writes** the results beside the model and an MLflow run below the training's.

    **Example:** `lidit evaluate scenes runs/demo/model per_tag=24`
    """


@app.command("scenes", context_settings=HELP_OPTIONS)
def scenes(
    model: Model, overrides: Settings = None, out: Out = None, as_json: AsJson = False
) -> None:
    """Draw the scene benchmark's prompts and score the images by program, lax and strict, beside
    the chance floor.

    The same command goes on where it stopped. `sampler.guidance_scale=5` and its like draw
    otherwise than the model's own sampler. **Writes** scores.md, scores.json, results.jsonl
    (GenEval's format), grid.png, images/ (GenEval's layout; those of an earlier evaluation are
    replaced) and, for list prompts, positions.png.

    **Example:** `lidit evaluate scenes runs/demo/model per_tag=24`
    """
    settings = _settings("scenes", overrides)
    require_model(model)
    from pipelines.evaluation.models import tracking_of
    from pipelines.evaluation.scenes import evaluate_scenes

    scores = evaluate_scenes(model, settings, tracking_of(model), _folder(model, out))
    _print_json(asdict(scores)) if as_json else show(scores)


@app.command("binding", context_settings=HELP_OPTIONS)
def binding(
    model: Model, overrides: Settings = None, out: Out = None, as_json: AsJson = False
) -> None:
    """Tell whether the loss is higher under a caption with swapped colours, shapes or relations;
    draws nothing.

    **Writes** binding.md, binding.json and binding-positions.png.

    **Example:** `lidit evaluate binding runs/demo/model binding_scenes=200`
    """
    settings = _settings("binding", overrides)
    require_model(model)
    from pipelines.evaluation.binding import evaluate_binding
    from pipelines.evaluation.models import tracking_of

    scores = evaluate_binding(model, settings, tracking_of(model), _folder(model, out))
    _print_json(asdict(scores)) if as_json else show(scores)


@app.command("suite", context_settings=HELP_OPTIONS)
def suite(
    name: Annotated[str, typer.Argument(metavar="SUITE", help=SUITES)],
    model: Model,
    overrides: Settings = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="The suite's prompt file; one per category.")
    ] = None,
    parse: Annotated[
        Path | None, typer.Option(help="What the suite's scorer wrote: sum it up.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="dpg_bench.csv, for DPG-Bench's categories.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers that draw.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of a worker.")] = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Draw a public suite's prompts in the layout that its official scorer reads; or sum up what
    that scorer wrote.

    **Reads** with --prompts the suite's lists, with --parse its scorer's results. **Writes** SUITE/
    or SUITE.md; an MLflow run with --parse.

    **Example:** `lidit evaluate suite geneval runs/demo/model --prompts evaluation_metadata.jsonl`
    """
    _require_work(name, prompts, parse, csv)
    settings, folder = _settings("suite", overrides), _folder(model, out)
    from lidit.config import PoolSettings
    from pipelines.evaluation.models import tracking_of
    from pipelines.evaluation.suites import sample_suite, track_results

    if prompts:
        pool = PoolSettings(actors=workers, gpus=gpus)
        made = sample_suite(model, name, prompts, settings, pool, folder / name)
        _print_json(asdict(made)) if as_json else show_suite(made)
    if parse:
        official = track_results(model, name, parse, csv, tracking_of(model), folder)
        if as_json:
            _print_json({"metrics": official.metrics, "notes": official.notes})
        else:
            print("\n".join([official.table, *official.notes]))


@app.command("pictures", context_settings=HELP_OPTIONS)
def pictures(
    model: Model,
    source: Annotated[
        list[str], typer.Argument(help="Held-out pictures with captions; and settings: pictures=64")
    ],
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Tell how often a held-out picture has a lower loss under its own caption than under another
    picture's.

    **Reads** sources as `lidit ingest` does. **Writes** held-out.json and held-out.png.

    **Example:** `lidit evaluate pictures runs/emoji/model held-out pictures=64`
    """
    sources, words = apart(source)
    if not sources:
        raise InputError("lidit evaluate pictures: give a folder or file of pictures with captions")
    settings = _settings("pictures", words)
    require_model(model)
    from pipelines.evaluation.held_out import evaluate_held_out
    from pipelines.evaluation.models import tracking_of

    match = evaluate_held_out(model, sources, settings, tracking_of(model), _folder(model, out))
    _print_json(asdict(match)) if as_json else show_held_out(match)


@app.command(WITHOUT_A_NAME, hidden=True, context_settings=HELP_OPTIONS)
def command(
    model: Model,
    overrides: Settings = None,
    out: Out = None,
    binding_too: Annotated[bool, typer.Option("--binding", help="As `evaluate binding`.")] = False,
    suite_name: Annotated[str | None, typer.Option("--suite", help="As `evaluate suite`.")] = None,
    prompts: Annotated[list[Path] | None, typer.Option(help="As of `evaluate suite`.")] = None,
    parse: Annotated[Path | None, typer.Option(help="As of `evaluate suite`.")] = None,
    csv: Annotated[Path | None, typer.Option(help="As of `evaluate suite`.")] = None,
    held_out: Annotated[
        list[str] | None, typer.Option("--pictures", help="As `evaluate pictures`.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="As of `evaluate suite`.")] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="As of `evaluate suite`.")] = None,
    as_json: AsJson = False,
) -> None:
    """The form without a measure's name: scenes, or what --binding, --suite and --pictures name.

    **Writes** what that measure writes.

    **Example:** `lidit evaluate runs/demo/model per_tag=24`
    """
    _check(binding_too, suite_name, prompts, parse, csv, held_out)
    if not suite_name and (workers is not None or gpus is not None):
        option = "--gpus" if workers is None else "--workers"
        raise InputError(
            f"{option} belongs to --suite, whose images several workers draw; all else runs here"
        )
    if suite_name:
        suite(
            suite_name, model, overrides, prompts, parse, csv, workers or 1, gpus or 0, out, as_json
        )
    elif binding_too:
        binding(model, overrides, out, as_json)
    elif held_out:
        pictures(model, [*held_out, *(overrides or [])], out, as_json)
    else:
        scenes(model, overrides, out, as_json)


def _settings(measure: str, overrides: list[str] | None) -> EvaluateSettings:
    """The settings, refused before anything is loaded where this measure does not use them: whoever
    gives one expects it to matter.
    """
    from lidit.config import EvaluateSettings
    from lidit.config.settings import apply_overrides, validate

    settings = validate(EvaluateSettings, apply_overrides({}, overrides or []), "lidit evaluate")
    for word in overrides or []:
        section = word.partition("=")[0].partition(".")[0]
        if section not in USED_BY[measure]:
            raise InputError(
                f"{word}: not used by this measure; it takes {', '.join(sorted(USED_BY[measure]))}"
            )
    return settings


def _folder(model: Path, out: Path | None) -> Path:
    return out or model.resolve().parent / "evaluation"


def _print_json(facts: dict[str, Any]) -> None:
    """A result without the table that people read; folders as text."""
    print(
        json.dumps(
            {key: value for key, value in facts.items() if key != "table"}, indent=1, default=str
        )
    )


def show(scores: Scores) -> None:
    """Print an evaluation's table and where its files are."""
    print(scores.table)
    print(
        f"{scores.folder}: "
        f"{'written' if scores.computed else 'already there, for this model and these settings'}"
    )


def show_held_out(match: CaptionMatch) -> None:
    of = f"{match.pictures} pictures" + (
        f" of {match.motifs} motifs" if match.motifs < match.pictures else ""
    )
    print(
        f"held-out pictures that prefer their own caption: {match.preference} of {of}, chance 0.5"
    )
    print(
        f"{match.grid}: "
        f"{'written' if match.computed else 'already there, for this model and these pictures'}"
    )


def show_suite(made: SuiteImages) -> None:
    state = f"{made.sampled} drawn in {made.seconds:.0f} s" if made.sampled else "already there"
    print(f"{made.folder}: {made.images} files, {state}")


def _check(
    binding: bool,
    suite: str | None,
    prompts: list[Path] | None,
    parse: Path | None,
    csv: Path | None,
    pictures: list[str] | None,
) -> None:
    if pictures and (binding or suite):
        raise InputError(
            "--pictures, --binding and --suite are three jobs: run them one after the other"
        )
    if suite is None and (prompts or parse or csv):
        raise InputError(
            "--prompts, --parse and --csv belong to --suite geneval, t2i-compbench, dpg-bench, "
            "segments4 or segments8"
        )
    if suite and binding:
        raise InputError("--binding and --suite are two jobs: run them one after the other")


def _require_work(
    suite: str, prompts: list[Path] | None, parse: Path | None, csv: Path | None
) -> None:
    if not (prompts or parse):
        raise InputError(f"{suite}: give --prompts FILE to draw, or --parse RESULTS to sum up")
    if csv and not parse:
        raise InputError("--csv is read together with --parse, the scorer's results")


if __name__ == "__main__":
    enter(app)
