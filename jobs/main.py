"""The `lidit` command: one sub-command per job."""

from __future__ import annotations

import typer

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
from jobs.support.start import environment, guarded

app = typer.Typer(
    help="LI-DiT on Ray: compute LLM prompt states once, train a diffusion transformer on them, track every run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
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
app.command("submit", context_settings=submit.OPEN)(submit.command)


def main() -> None:
    environment()
    guarded(app)


if __name__ == "__main__":
    main()
