"""The store's side of a run: found or created, and what the store refuses told apart from a store
that is away.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Experiment, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

from lidit.errors import InputError, one_line
from pipelines.tracking.origin import DESCRIPTION, PARENT, origin_tags
from pipelines.tracking.store import sign_in, sqlite_file

RUN_KEY = "lidit.run_key"
JOB = "lidit.job"  # tag: the kind of job
# tags: digest of what a run made; digests of what it reads
MADE, MADE_FROM = "lidit.made", "lidit.made_from"
# tag: MLflow opens the experiment in its view for training, not for chats
KIND = "mlflow.experimentKind"
# What every link of ours carries: without it MLflow's pages turn to their view for chats.
VIEW = "workflowType=machine_learning"
ABOUT = (
    "Trainings of LI-DiT; below each what was measured of its model; beside them the ingests, "
    "embeddings and latents that they read."
)
RUN_FILE = "mlflow-run"  # in a run's folder: the id of its run
PARAM_LIMIT = 6000
NAME_LIMIT = 250
NOT_IN_A_NAME = re.compile(r"[^\w. :/-]")
# The store may take the same call a moment later.
BUSY = (408, 409, 429, 499)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunHandle:
    """What a worker needs to log into the driver's run. `run_id` is empty while the tracker has not
    answered yet.
    """

    uri: str
    run_id: str
    outbox: str


@dataclass(frozen=True)
class RunSpec:
    """A job as the store knows it. Its run is found again by the id in its folder, else by the tag
    `key`.
    """

    experiment: str
    name: str
    key: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    folder: Path


def find_or_create(uri: str, spec: RunSpec) -> str:
    """The id of the job's run, RUNNING, with its parameters and tags.

    A changed parameter of a continued run stays as it was first logged (MLflow never rewrites one)
    and is written as a tag `changed.NAME`. Raises InputError where the store refuses it, and
    whatever MLflow raises where it is away.
    """
    try:
        client = MlflowClient(uri)
        experiment = _experiment(client, uri, spec.experiment)
        params = {accepted_name(name): value[:PARAM_LIMIT] for name, value in spec.params.items()}
        tags = {
            accepted_name(name): value for name, value in {**origin_tags(), **spec.tags}.items()
        }
        if PARENT in tags and not _is_known(client, tags[PARENT]):
            del tags[PARENT]
        run = _own_run(client, spec) or _run_with_key(client, experiment.experiment_id, spec.key)
        if run is None:
            run = client.create_run(
                experiment.experiment_id,
                run_name=spec.name,
                tags={RUN_KEY: spec.key, "lidit.attempt": "1"},
            )
            if DESCRIPTION in tags:
                tags[DESCRIPTION] += _links(
                    client, experiment.experiment_id, tags.get(MADE_FROM, "")
                )
        else:
            tags.pop(DESCRIPTION, None)  # people edit it
            known = run.data.params
            changed = {k: v for k, v in params.items() if known.get(k, v) != v}
            attempt = int(run.data.tags.get("lidit.attempt", "1")) + 1
            tags |= {
                **{f"changed.{k}"[:NAME_LIMIT]: v for k, v in changed.items()},
                "lidit.attempt": str(attempt),
            }
            params = {k: v for k, v in params.items() if k not in known}
            client.update_run(run.info.run_id, status="RUNNING")
            _tell_where_files_go(uri, run)
        client.log_batch(
            run.info.run_id,
            params=[Param(k, v) for k, v in params.items()],
            tags=[RunTag(k, v) for k, v in tags.items()],
        )
    except MlflowException as error:
        if _is_refusal(error):
            raise InputError(
                f"the tracker {uri} refuses this run: {one_line(error, 300)}"
            ) from None
        raise
    return str(run.info.run_id)


def read_run_id(folder: Path) -> str:
    """The id of the tracker's run that a run folder holds; empty before the tracker gave one."""
    path = folder / RUN_FILE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def first_page(uri: str) -> str:
    """Where MLflow's pages begin: the runs of the experiment that was changed last.

    A click in the list of experiments leads to the view for chats, whatever its address says.
    """
    found: list[Experiment] = []
    try:
        found = MlflowClient(uri).search_experiments(order_by=["last_update_time DESC"])
    except MlflowException as error:  # the server says it, too, and what to do
        log.info("the experiments of %s cannot be listed: %s", uri, one_line(error, 200))
    ours = [each.experiment_id for each in found if each.name != Experiment.DEFAULT_EXPERIMENT_NAME]
    return f"#/experiments/{ours[0]}/runs?{VIEW}" if ours else f"#/experiments?{VIEW}"


def check_experiment(uri: str, experiment: str) -> None:
    """Raise InputError where the store answers and refuses the experiment, before a long job's work
    is done.

    A store that is away refuses nothing: the job's numbers wait for it.
    """
    sign_in(uri)
    try:
        _experiment(MlflowClient(uri), uri, experiment)
    except MlflowException as error:
        if _is_refusal(error):
            raise InputError(
                f"the tracker {uri} refuses the experiment: {one_line(error, 300)}"
            ) from None
    except InputError:
        raise
    except Exception as error:  # whatever a store that is away makes MLflow raise
        log.info("the tracker %s does not answer: %s", uri, one_line(error, 200))


def accepted_name(name: str) -> str:
    """The name of a metric, parameter or tag as MLflow takes it: others would be refused with all
    that came along.
    """
    name = NOT_IN_A_NAME.sub("_", name)[:NAME_LIMIT]
    # MLflow takes names as paths, and refuses those that lead elsewhere.
    if name != posixpath.normpath(name) or name.startswith(("/", "..")) or name == ".":
        name = name.replace("/", "_").replace(".", "_") or "_"
    return name


def _is_refusal(error: MlflowException) -> bool:
    """Whether the store answered, and will answer the same tomorrow."""
    if isinstance(
        error, UnsupportedModelRegistryStoreURIException
    ) or "out-of-date database schema" in str(error):
        return True
    status = error.get_http_status_code()
    return 400 <= status < 500 and status not in BUSY


def _own_run(client: MlflowClient, spec: RunSpec) -> Run | None:
    """The run whose id the job's folder holds; None where there is none, or the store does not know
    it.

    A folder keeps its run wherever it is moved to, while the tag is made of the folder's path. An
    arm's result has the folder of its training, and a run of its own.
    """
    try:
        run_id = (spec.folder / RUN_FILE).read_text().strip()
        run = client.get_run(run_id) if run_id else None
    except (OSError, ValueError):
        return None
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    if run is None or run.info.lifecycle_stage != "active":
        return None
    return run if run.data.tags.get(JOB) == spec.tags.get(JOB) else None


def _is_known(client: MlflowClient, run_id: str) -> bool:
    """Whether the store has this run: a model that came from elsewhere names a parent of another
    store.
    """
    try:
        return bool(client.get_run(run_id))
    except MlflowException as error:
        if _is_refusal(error):
            return False
        raise


def _links(client: MlflowClient, experiment_id: str, digests: str) -> str:
    """Markdown links to the runs that made what this one reads, where the experiment has them."""
    lines = []
    for digest in digests.split():
        found = client.search_runs([experiment_id], f"tags.`{MADE}` = '{digest}'", max_results=1)
        lines += [
            f"- [{run.info.run_name}](#/experiments/{experiment_id}/runs/{run.info.run_id}?{VIEW})"
            for run in found
        ]
    return "\n\nMade from the results of\n" + "\n".join(lines) if lines else ""


def _run_with_key(client: MlflowClient, experiment_id: str, key: str) -> Run | None:
    found = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
    return found[0] if found else None


def _experiment(client: MlflowClient, uri: str, name: str) -> Experiment:
    """The experiment of this name, created where the store has none; its files lie beside a sqlite
    store.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        file = sqlite_file(uri)
        root = (file.parent / "artifacts").resolve().as_uri() if file else None
        tags = {KIND: "custom_model_development", DESCRIPTION: ABOUT}
        try:
            return client.get_experiment(client.create_experiment(name, root, tags))
        except MlflowException:  # another job created it a moment ago
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise InputError(
            f"the experiment {name!r} was deleted in the tracker {uri}; restore it (mlflow "
            "experiments restore "
            f"--experiment-id {found.experiment_id}, or on MLflow's page), or name another: "
            "tracking.experiment=NAME"
        )
    return found


def _tell_where_files_go(uri: str, run: Run) -> None:
    """Warn where the store was moved: MLflow keeps the address that a run's files had when it was
    created.
    """
    file, root = sqlite_file(uri), run.info.artifact_uri or ""
    if file is None or not root.startswith(("file:", "/")):
        return
    folder = Path(unquote(urlsplit(root).path))
    if file.parent.resolve() not in folder.parents:
        log.warning(
            "the files of MLflow run %s go to %s, not beside its store %s: the store was moved "
            "or copied",
            run.info.run_id,
            folder,
            file,
        )


def earlier_name(metric: str) -> str:
    """What the first releases called a metric of training: they had no sections."""
    return metric.removeprefix("train/")


def curves(uri: str, run_id: str, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each of a run's metrics that it has; none where the tracker
    does not answer.
    """
    sign_in(uri)
    client = MlflowClient(uri)
    try:
        found = {name: history(client, run_id, name) for name in names}
    except MlflowException as error:
        log.warning("no curves of run %s: %s", run_id, one_line(error, 200))
        return {}
    return {name: points for name, points in found.items() if points}


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in order of steps, those under its earlier name among them."""
    named = [earlier_name(name), name] if earlier_name(name) != name else [name]
    return sorted(
        (point.step, point.value)
        for each in named
        for point in client.get_metric_history(run_id, each)
    )
