"""The `lidit` command: one sub-command per job."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Annotated

import typer

import lidit
from jobs import (
    ablate,
    align,
    audit,
    demo,
    demo_pictures,
    distill,
    doctor,
    embed,
    encoders,
    evaluate,
    export,
    guard,
    ingest,
    inspect,
    keys,
    latents,
    pictures,
    plan,
    probe,
    recipe,
    repair,
    report,
    run,
    runs,
    sample,
    scenes,
    serve,
    status,
    submit,
    train,
    train_codec,
    tune_sampler,
    ui,
    verify,
    verify_image,
)
from jobs.support.start import HELP_OPTIONS, QUIET, enter


def _without_commands() -> typer.Typer:
    return typer.Typer(
        help="LI-DiT on Ray: compute LLM prompt states once, train a diffusion transformer on "
        "them, track every run.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings=HELP_OPTIONS,
    )


app = _without_commands()
# The help shows the commands of a panel together, in this order. Modules of jobs import no library
# at the top: the help, and whatever is wrong with a command's words, must not wait for torch.
PANELS: dict[str, tuple[tuple[str, ModuleType], ...]] = {
    "Data": (
        ("scenes", scenes),
        ("pictures", pictures),
        ("ingest", ingest),
        ("embed", embed),
        ("encoders", encoders),
        ("latents", latents),
        ("inspect", inspect),
        ("verify", verify),
        ("repair", repair),
        ("export", export),
    ),
    "Train": (
        ("demo", demo),
        ("demo-pictures", demo_pictures),
        ("plan", plan),
        ("run", run),
        ("train", train),
        ("train-codec", train_codec),
        ("distill", distill),
        ("align", align),
        ("runs", runs),
        ("status", status),
        ("ui", ui),
    ),
    "Check": (
        ("sample", sample),
        ("tune-sampler", tune_sampler),
        ("report", report),
        ("probe", probe),
        ("ablate", ablate),
    ),
    "Serve": (
        ("serve", serve),
        ("audit", audit),
        ("verify-image", verify_image),
    ),
}
CLUSTER = "Cluster"
for panel, commands in PANELS.items():
    for name, job in commands:
        app.command(name, rich_help_panel=panel)(job.command)
app.add_typer(evaluate.app, name="evaluate", rich_help_panel="Check")
app.add_typer(recipe.app, name="recipes", rich_help_panel="Train")
app.add_typer(keys.app, name="keys", rich_help_panel="Serve")
app.add_typer(guard.app, name="guard", rich_help_panel="Serve")
app.command("doctor", rich_help_panel=CLUSTER)(doctor.command)
app.command("submit", context_settings=submit.OPEN, rich_help_panel=CLUSTER)(submit.command)


@app.command("help", rich_help_panel=CLUSTER)
def show_help(
    context: typer.Context,
    command: Annotated[
        str | None, typer.Argument(help="A command; all are listed without it.")
    ] = None,
) -> None:
    """Show what a command does, reads and writes, as its option --help does.

    **Reads** and **Writes** nothing.

    **Example:** `lidit help train`
    """
    app(
        [*([command] if command else []), "--help"],
        prog_name=context.find_root().info_name,
        standalone_mode=False,
    )


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from lidit.commit import git_state

    state = git_state()
    changed = " with changes" if state.get("git.dirty") == "true" else ""
    print(f"lidit {lidit.__version__}, commit {state.get('git.commit', 'unknown')}{changed}")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Version and commit, and exit."
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress; results, warnings and errors only.")
    ] = False,
) -> None:
    """What stands before the command."""
    if quiet:
        os.environ[QUIET] = "1"


def overview() -> typer.Typer:
    """The same commands without their options, which the list of commands does not show: typer
    takes longer to read them than to write that list.
    """
    listing = _without_commands()
    listing.callback()(options)
    for group in app.registered_groups:
        registered = group.typer_instance and group.typer_instance.registered_callback
        about = registered.callback.__doc__ if registered and registered.callback else None
        empty = typer.Typer(help=about)
        listing.add_typer(empty, name=group.name, rich_help_panel=group.rich_help_panel)
    for command in app.registered_commands:
        about = command.callback.__doc__ if command.callback else None
        listing.command(command.name, help=about, rich_help_panel=command.rich_help_panel)(_nothing)
    return listing


def _nothing() -> None:
    """Stands for a command in a list of them."""


def main() -> None:
    listed = sys.argv[1:] in ([], ["-h"], ["--help"])
    enter(overview() if listed else app)


if __name__ == "__main__":
    main()
