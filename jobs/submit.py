"""`lidit submit`: any job on a Ray cluster, once, followed to its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.support.abrupt import interrupts_are_answers
from jobs.support.options import node_labels
from lidit.errors import InputError

if TYPE_CHECKING:
    from pipelines.submission.submit import Submission

# A job's options may be called as ours (`--gpus`): whatever stands behind JOB is the job's.
OPEN = {"allow_extra_args": True, "allow_interspersed_args": False}
NO_JOBS = {"__init__", "entry", "main", "recipe", "start", "submit", "ui"}


def command(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="Job to run: embed, train, ...")],
    address: Annotated[
        str | None, typer.Option(help="The dashboard's URL: http://127.0.0.1:8265 (needed)")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs of the job's own process.")
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(min=0, help="CPUs of the job's own process.")
    ] = None,
    node_label: Annotated[
        list[str] | None, typer.Option(help="Ray node label it asks for: lidit/pool=large")
    ] = None,
) -> None:
    """Send a job to a Ray cluster, follow its log, return its exit code. Everything after JOB goes
    to the job.

    The current folder's code and files are sent along, but for what .gitignore names. The same
    command, files and code again follow the first submission instead of starting a second one. The
    token is RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. The job's own process runs on
    the head unless GPUs, CPUs or a label are
    asked for: `evaluate`, `sample`, `report` and `run` use a model in it.

    **Reads** the current folder. **Writes** nothing here; the job, what its own help says, on the
    cluster.

    **Example:** `lidit submit --address http://127.0.0.1:8265 --gpus 1 evaluate /runs/demo/model`
    """
    from pipelines.submission.submit import submit

    if address is None:
        raise InputError(
            "lidit submit: give --address URL before the job, such as http://127.0.0.1:8265"
        )
    interrupts_are_answers()
    raise typer.Exit(submit(asked_for(job, context.args, gpus, cpus, node_label), address))


def asked_for(
    job: str,
    arguments: Sequence[str],
    gpus: float | None,
    cpus: float | None,
    node_label: list[str] | None,
) -> Submission:
    """What the command's words ask for, from the current folder."""
    from pipelines.submission.submit import Driver, Submission

    driver = Driver(gpus, cpus, node_labels(node_label))
    return Submission(module_of(job), tuple(arguments), Path(), corpus_digest(arguments), driver)


def module_of(job: str) -> str:
    """The module of a job in this folder, as `train_codec` for `train-codec`. InputError where
    there is none.
    """
    known = sorted(path.stem for path in Path("jobs").glob("*.py") if path.stem not in NO_JOBS)
    if not known:
        raise InputError(
            f"{Path().resolve()}: no jobs/ here to send; start from the root of the checkout"
        )
    name = job.replace("-", "_")
    if name not in known:
        listed = ", ".join(other.replace("_", "-") for other in known)
        raise InputError(f"{job!r}: no such job in jobs/; one of {listed}")
    return name


def corpus_digest(arguments: Sequence[str]) -> str | None:
    """The digest of the corpus a command names, if this machine can read it.

    An override `corpus=...` comes before the recipe's `corpus`, that before a folder among the
    arguments.
    """
    from lidit.config.settings import load_yaml
    from lidit.config.shipped import RECIPES
    from lidit.store import Corpus

    named = [
        argument.removeprefix("corpus=") for argument in arguments if argument.startswith("corpus=")
    ]
    recipes = [
        RECIPES / f"{argument}.yaml"
        for argument in arguments
        if argument.replace("-", "").isalnum()
    ]
    recipes += [Path(argument) for argument in arguments if argument.endswith((".yaml", ".yml"))]
    named += [str(load_yaml(path).get("corpus") or "") for path in recipes if path.is_file()]
    named += [argument for argument in arguments if "://" in argument or Path(argument).is_dir()]
    for name in filter(None, named):
        try:
            return Corpus.open(name).digest
        except Exception:
            # for the record only: what keeps this machine from it need not keep the cluster from it
            continue
    return None
