"""`lidit submit`: any job on a Ray cluster, once, followed to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lidit.errors import InputError

OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}


def command(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="Job to run: embed, train, ...")],
    address: Annotated[str, typer.Option(help="The dashboard's URL: http://127.0.0.1:8265")],
) -> None:
    """Send a job to a Ray cluster, follow its log, return its exit code. Everything after JOB goes to the job.

    The current folder's code and files are sent along. The same command, files and code again follow the first
    submission instead of starting a second one. The token is RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    **Example:** `lidit submit --address http://127.0.0.1:8265 train recipe.yaml train.steps=1000`
    """
    from pipelines.submit import Submission, submit

    if not Path("jobs", f"{job}.py").is_file():
        raise InputError(f"{job!r}: no jobs/{job}.py here; start from the folder of the code, with a job such as train")
    raise typer.Exit(submit(Submission(job, tuple(context.args)), address))
