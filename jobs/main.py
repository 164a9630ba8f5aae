"""The `lidit` command: one sub-command per job."""

from __future__ import annotations

from typing import Annotated

import typer

import lidit
from jobs import (
    ablate,
    demo,
    demo_pictures,
    embed,
    evaluate,
    export,
    ingest,
    inspect,
    latents,
    pictures,
    plan,
    probe,
    recipe,
    repair,
    report,
    run,
    sample,
    scenes,
    submit,
    train,
    train_codec,
    verify,
)
from jobs.support.start import HELP_OPTIONS, enter

app = typer.Typer(
    help="LI-DiT on Ray: compute LLM prompt states once, train a diffusion transformer on them, track every run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings=HELP_OPTIONS,
)
for name, job in (
    ("demo", demo),
    ("demo-pictures", demo_pictures),
    ("run", run),
    ("plan", plan),
    ("scenes", scenes),
    ("pictures", pictures),
    ("ingest", ingest),
    ("embed", embed),
    ("latents", latents),
    ("train", train),
    ("train-codec", train_codec),
    ("sample", sample),
    ("evaluate", evaluate),
    ("probe", probe),
    ("ablate", ablate),
    ("report", report),
    ("inspect", inspect),
    ("verify", verify),
    ("repair", repair),
    ("export", export),
):
    app.command(name)(job.command)
app.add_typer(recipe.app, name="recipes")
app.command("submit", context_settings=submit.OPEN)(submit.command)


@app.command("help")
def show_help(
    context: typer.Context,
    command: Annotated[str | None, typer.Argument(help="A command; all are listed without it.")] = None,
) -> None:
    """Show what a command does, reads and writes, as its option --help does.

    **Reads** and **Writes** nothing.

    **Example:** `lidit help train`
    """
    app([*([command] if command else []), "--help"], prog_name=context.find_root().info_name, standalone_mode=False)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from pipelines.tracking import git_state

    state = git_state()
    changed = " with changes" if state.get("git.dirty") == "true" else ""
    print(f"lidit {lidit.__version__}, commit {state.get('git.commit', 'unknown')}{changed}")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version and commit, and exit.")
    ] = False,
) -> None:
    """What stands before the command."""


def main() -> None:
    enter(app)


if __name__ == "__main__":
    main()
