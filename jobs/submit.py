"""`lidit submit`: any job on a Ray cluster, once, followed to its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from jobs.recipe import RECIPES
from lidit.errors import InputError
from lidit.settings import load_yaml
from lidit.store import Corpus

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
    arguments = tuple(context.args)
    raise typer.Exit(submit(Submission(job, arguments, corpus_digest=corpus_digest(arguments)), address))


def corpus_digest(arguments: Sequence[str]) -> str | None:
    """The digest of the corpus a command names, if this machine can read it.

    An override `corpus=...` comes before the recipe's `corpus`, that before a folder among the arguments.
    """
    named = [argument.removeprefix("corpus=") for argument in arguments if argument.startswith("corpus=")]
    recipes = [RECIPES / f"{argument}.yaml" for argument in arguments if argument.replace("-", "").isalnum()]
    recipes += [Path(argument) for argument in arguments if argument.endswith((".yaml", ".yml"))]
    named += [str(load_yaml(path).get("corpus") or "") for path in recipes if path.is_file()]
    named += [argument for argument in arguments if "://" in argument or Path(argument).is_dir()]
    for name in filter(None, named):
        try:
            return Corpus.open(name).digest
        except Exception:  # for the record only: what keeps this machine from it need not keep the cluster from it
            continue
    return None
