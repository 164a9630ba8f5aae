"""MLflow, behind one small class: the only module that imports it.

The driver finds or creates one run per job (tag `lidit.run_key`), owns its status and hands its id to the workers;
rank 0 logs into it. Steps that the store already holds of a metric are left out, so a resumed run continues its curve
without doubled or lost points. Whatever the tracker does, training goes on: see `delivery`.
"""

from __future__ import annotations

import json
import logging
import mimetypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit, urlunsplit


def prepare_environment() -> None:
    """Settings that MLflow reads from the environment, for whoever has not set them. Called before it is imported:
    its telemetry starts, or does not, with the import."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "False")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # A proxy in maintenance may ask for an hour's patience, in the thread that is about to start a training.
    os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # but a file's, see `patience`


prepare_environment()

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.utils.rest_utils import augmented_raise_for_status, http_request

from lidit.errors import InputError, one_line
from pipelines.tracking.delivery import Delivery, GoneError, Record, files_in, patience

RUN_KEY = "lidit.run_key"
STEP = "lidit.step"
OUTBOX = "tracking.spool.jsonl"  # the name is part of a run's folder: earlier releases wrote it
PARAM_LIMIT = 6000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunHandle:
    """What a worker needs to log into the driver's run. `run_id` is empty while the tracker has not answered yet."""

    uri: str
    run_id: str
    outbox: str


def local_store(folder: Path) -> str:
    """The uri of the sqlite store in `folder`."""
    return f"sqlite:///{folder.resolve()}/mlflow.db"


def store_uri(uri: str | None, folder: Path) -> str:
    """The recipe's store, else the one in MLFLOW_TRACKING_URI, else a sqlite file in `folder`; never with a password.

    The address is logged, so user and password of an http(s) address are left out: `sign_in` takes them over. Raises
    InputError for a database address with a password.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    return _without_password(uri) if uri else local_store(folder)


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if not parts.password:
        return uri
    if parts.scheme not in ("http", "https"):
        raise InputError(
            "MLFLOW_TRACKING_URI: a database address with a password would be logged; give the password by the "
            "database's own means (PGPASSWORD, ~/.pgpass), or use an MLflow server"
        )
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def sign_in(uri: str) -> None:
    """Hand user and password of MLFLOW_TRACKING_URI to MLflow's client, where `uri` is that address without them.

    The client reads them from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, which this sets.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    parts = urlsplit(given)
    if parts.password and parts.scheme in ("http", "https") and _without_password(given) == uri:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)


def credentials() -> dict[str, str]:
    """What a worker on another node needs in its environment to log; hand it over where nothing records it."""
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    return {name: os.environ[name] for name in names if name in os.environ}


def open_command(uri: str) -> str:
    """The one command that shows a store's runs."""
    if uri.startswith("sqlite:///"):
        return f"mlflow ui --backend-store-uri {uri}"
    return f"open {uri}"


def git_state() -> dict[str, str]:
    """Commit and cleanliness of the checkout this code runs from; LIDIT_GIT_COMMIT where there is none.

    The variable is set by whatever took the code away from its checkout: an image's build, `lidit submit`.
    """
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not somebody else's checkout around an installation
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("LIDIT_GIT_COMMIT", "")
        return {"git.commit": commit} if commit else {}


def curves(uri: str, run_id: str, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each of a run's metrics that it has; none where the tracker does not answer."""
    sign_in(uri)
    client = MlflowClient(uri)
    try:
        histories = {name: client.get_metric_history(run_id, name) for name in names}
    except MlflowException as error:
        log.warning("no curves of run %s: %s", run_id, one_line(error, 200))
        return {}
    return {name: [(point.step, point.value) for point in history] for name, history in histories.items() if history}


@contextmanager
def tracked_run(
    uri: str, experiment: str, name: str, key: str, params: Mapping[str, str], tags: Mapping[str, str], folder: Path
) -> Iterator[Tracker]:
    """The run with this key: continued where it exists, created where not; FINISHED, FAILED or KILLED at the end.

    A changed parameter of a continued run stays as it was first logged (MLflow never rewrites one) and is written as
    a tag `changed.NAME`. A tracker that cannot be reached is reported once and the job goes on with a outbox file.
    """
    sign_in(uri)
    outbox = folder / OUTBOX

    def connect() -> RunHandle:
        return _find_or_create(uri, experiment, name, key, params, {**git_state(), **tags}, outbox)

    try:
        handle = connect()
    except Exception as error:  # a tracker that is down must not stop a job, whatever it raises
        log.warning("the tracker does not answer, metrics wait in %s: %s", outbox, one_line(error, 200))
        handle = RunHandle(uri, "", str(outbox))
    tracker = Tracker(handle, connect)
    try:
        yield tracker
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    tracker.close("FINISHED")


def _find_or_create(
    uri: str, experiment: str, name: str, key: str, params: Mapping[str, str], tags: Mapping[str, str], outbox: Path
) -> RunHandle:
    client = MlflowClient(uri)
    experiment_id = _experiment_id(client, uri, experiment)
    runs = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
    if runs:
        run = runs[0]
        changed = {k: v for k, v in params.items() if run.data.params.get(k, v[:PARAM_LIMIT]) != v[:PARAM_LIMIT]}
        new = {k: v for k, v in params.items() if k not in run.data.params}
        attempt = int(run.data.tags.get("lidit.attempt", "1")) + 1
        tags = {**tags, **{f"changed.{k}": v for k, v in changed.items()}, "lidit.attempt": str(attempt)}
        client.update_run(run.info.run_id, status="RUNNING")
        params = new
    else:
        run = client.create_run(experiment_id, run_name=name, tags={RUN_KEY: key, "lidit.attempt": "1"})
    client.log_batch(
        run.info.run_id,
        params=[Param(k, v[:PARAM_LIMIT]) for k, v in params.items()],
        tags=[RunTag(k, v) for k, v in tags.items()],
    )
    return RunHandle(uri, run.info.run_id, str(outbox))


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment of this name, created where the store has none; its files lie beside a sqlite store."""
    existing = client.get_experiment_by_name(name)
    if existing is None:
        root = Path(uri.removeprefix("sqlite:///")).parent / "artifacts" if uri.startswith("sqlite:///") else None
        try:
            return str(client.create_experiment(name, root.resolve().as_uri() if root else None))
        except MlflowException:  # another job created it a moment ago
            existing = client.get_experiment_by_name(name)
            if existing is None:
                raise
    return str(existing.experiment_id)


class _ProxiedArtifacts(MlflowArtifactsRepository):
    """A server's artifacts, each file with its own patience: MLflow has one timeout for all calls."""

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        if self._should_multipart_upload(local_file):  # pieces, straight to the bucket: nobody waits for a proxy
            super().log_artifact(local_file, artifact_path)
            return
        path = Path(local_file)
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        with path.open("rb") as file:
            answer = http_request(
                self._host_creds,
                f"/{PurePosixPath(artifact_path or '', path.name)}",
                "PUT",
                data=file,
                extra_headers={"Content-Type": kind},
                timeout=patience(path),
                max_retries=0,  # it would wait as long again; the tracker tries again itself
            )
        augmented_raise_for_status(answer)


class Tracker:
    """Logs into one run from a background thread. Every method but `close` returns at once.

    `connect` makes the handle anew where the tracker was down at the start; only the driver has it. What a worker
    could not deliver, but metrics, is left to the driver, which holds no GPUs while it waits.
    """

    def __init__(self, handle: RunHandle, connect: Callable[[], RunHandle] | None = None) -> None:
        self.handle, self._connect = handle, connect
        self.client = MlflowClient(handle.uri)
        self._newest: dict[str, int] = {}  # metric -> highest step the store has of it
        self._delivery = Delivery(Path(handle.outbox), self._send, self._is_connected, connect is not None)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of a global step; those that the run already has at this or a later step are left out."""
        self._delivery.put({"step": step, "time": int(time.time() * 1000), "values": dict(values)})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file, or everything in a folder. It is read later: leave it where it is."""
        self._delivery.put({"artifact": str(path.absolute()), "folder": folder})

    def dataset(self, name: str, digest: str, source: str) -> None:
        """The corpus as the run's input: its digest is what training verified."""
        self._delivery.put({"dataset": name, "digest": digest[:36], "source": source})

    def register(self, name: str, artifact: str, alias: str) -> None:
        """The run's artifact folder as a new version of model `name`, found by `models:/name@alias`.

        Not before everything logged into that folder has arrived: people load what the alias points at.
        """
        self._delivery.put({"register": name, "of": artifact, "alias": alias})

    def history(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and values the store holds of a metric, in order; empty where it does not answer."""
        try:
            points = self.client.get_metric_history(self.handle.run_id, metric) if self.handle.run_id else []
        except Exception as error:
            log.warning("the history of %s could not be read: %s", metric, one_line(error, 200))
            points = []
        points = sorted(points, key=lambda point: point.step)
        return [float(point.step) for point in points], [point.value for point in points]

    def known(self, prefix: str) -> list[str]:
        """Names of the run's metrics that start with `prefix`, sorted; none where the store does not answer."""
        try:
            names = self.client.get_run(self.handle.run_id).data.metrics if self.handle.run_id else {}
        except Exception as error:
            log.warning("the run's metrics could not be listed: %s", one_line(error, 200))
            names = {}
        return sorted(name for name in names if name.startswith(prefix))

    def close(self, status: str = "") -> None:
        """Deliver what waits, keep the rest in the outbox, then set the run's status where `status` names it.

        Waits as long as things arrive, and for a file as long as its size allows.
        """
        self._delivery.close()
        if status and self.handle.run_id:
            try:
                self.client.set_terminated(self.handle.run_id, status)
            except Exception as error:
                log.warning("the run's status %s could not be set: %s", status, one_line(error, 200))

    # -- called by the delivering thread ------------------------------------------------------------------------------

    def _is_connected(self, at_end: bool) -> bool:
        """Whether there is a run to log into. At the end the driver asks once more."""
        if at_end and self._connect and not self.handle.run_id:
            try:
                self.handle = self._connect()
            except Exception as error:
                log.warning("the tracker never answered: %s", one_line(error, 200))
        return bool(self.handle.run_id)

    def _send(self, record: Record) -> None:
        """Raises whatever the tracker's client raises, and GoneError."""
        match record:
            case {"values": values, "step": step, "time": when}:
                self._send_metrics(values, step, when)
            case {"artifact": path, "folder": folder}:
                self._send_files(Path(path), folder)
            case {"register": name, "of": folder, "alias": alias}:
                self._register(name, folder, alias)
            case {"dataset": name, "digest": digest, "source": source}:
                entry = Dataset(name=name, digest=digest, source_type="local", source=json.dumps({"uri": source}))
                self.client.log_inputs(self.handle.run_id, [DatasetInput(entry, [])])
            case _:
                raise ValueError(f"not known here: {record}")

    def _send_metrics(self, values: Mapping[str, float], step: int, when: int) -> None:
        """Without what the store has already."""
        fresh = {key: float(value) for key, value in values.items() if step > self._newest_step(key)}
        if fresh:
            metrics = [Metric(key, value, when, step) for key, value in fresh.items()]
            self.client.log_batch(self.handle.run_id, metrics=metrics, tags=[RunTag(STEP, str(step))])
        self._newest.update(dict.fromkeys(fresh, step))

    def _send_files(self, path: Path, folder: str) -> None:
        if not path.exists():
            raise GoneError(f"{path} is no longer there")
        root = self.client.get_run(self.handle.run_id).info.artifact_uri
        proxied = _ProxiedArtifacts(root, self.handle.uri) if root.startswith("mlflow-artifacts:") else None
        top = path if path.is_dir() else path.parent
        for file in files_in(path):
            inside = PurePosixPath(folder, file.parent.relative_to(top))
            where = str(inside) if inside.parts else None
            with self._delivery.sending(file):
                if proxied:
                    proxied.log_artifact(str(file), where)
                else:
                    self.client.log_artifact(self.handle.run_id, str(file), where)

    def _register(self, name: str, folder: str, alias: str) -> None:
        self._delivery.require_arrived(folder)
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        root = self.client.get_run(self.handle.run_id).info.artifact_uri
        made = self.client.create_model_version(name, f"{root}/{folder}", self.handle.run_id)
        self.client.set_registered_model_alias(name, alias, made.version)

    def _newest_step(self, metric: str) -> int:
        """Asked of the store itself, once per metric: a killed worker may have logged more than anybody noted."""
        if metric not in self._newest:
            points = self.client.get_metric_history(self.handle.run_id, metric)
            self._newest[metric] = max((point.step for point in points), default=-1)
        return self._newest[metric]
