"""MLflow, behind one small class: the only module that imports it.

The driver finds or creates one run per job (tag `lidit.run_key`), owns its status and hands its id to the workers;
rank 0 logs into it. Metrics at or below the run's high-water step are left out, so a resumed run continues its curve
without doubled points. Whatever the tracker does, training goes on: calls are made by a thread from a bounded queue,
and what could not be delivered is spooled to a file and sent when the tracker answers again.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "False")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

RUN_KEY = "lidit.run_key"
STEP = "lidit.step"
RETRY_SECONDS = 15.0
QUEUE_LENGTH = 10_000
PARAM_LIMIT = 6000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunHandle:
    """What a worker needs to log into the driver's run. `high_water`: metrics up to this step are there already."""

    uri: str
    run_id: str
    high_water: int
    spool: str


def local_store(folder: Path) -> str:
    """The uri of the sqlite store in `folder`."""
    return f"sqlite:///{folder.resolve()}/mlflow.db"


def open_command(uri: str) -> str:
    """The one command that shows a store's runs."""
    if uri.startswith("sqlite:///"):
        return f"mlflow ui --backend-store-uri {uri}"
    return f"open {uri}"


def git_state() -> dict[str, str]:
    """Commit and cleanliness of the checkout this code runs from; empty where there is none."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}


@contextmanager
def tracked_run(
    uri: str, experiment: str, name: str, key: str, params: Mapping[str, str], tags: Mapping[str, str], folder: Path
) -> Iterator[Tracker]:
    """The run with this key: continued where it exists, created where not; FINISHED, FAILED or KILLED at the end.

    A changed parameter of a continued run stays as it was first logged (MLflow never rewrites one) and is written as
    a tag `changed.NAME`. A tracker that cannot be reached is reported once and the job goes on with a spool file.
    """
    spool = folder / "tracking.spool.jsonl"
    try:
        handle = _find_or_create(uri, experiment, name, key, params, {**git_state(), **tags}, spool)
    except Exception as error:  # a tracker that is down must not stop a job, whatever it raises
        log.warning("tracking is off, %s does not answer: %s", uri, _line(error))
        handle = RunHandle(uri, "", -1, str(spool))
    tracker = Tracker(handle)
    try:
        yield tracker
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    tracker.close("FINISHED")


def _find_or_create(
    uri: str, experiment: str, name: str, key: str, params: Mapping[str, str], tags: Mapping[str, str], spool: Path
) -> RunHandle:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        root = Path(uri.removeprefix("sqlite:///")).parent / "artifacts" if uri.startswith("sqlite:///") else None
        try:
            experiment_id = client.create_experiment(experiment, root.resolve().as_uri() if root else None)
        except MlflowException:  # another job created it a moment ago
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise
            experiment_id = found.experiment_id
    else:
        experiment_id = found.experiment_id
    runs = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
    if runs:
        run = runs[0]
        changed = {k: v for k, v in params.items() if run.data.params.get(k, v[:PARAM_LIMIT]) != v[:PARAM_LIMIT]}
        new = {k: v for k, v in params.items() if k not in run.data.params}
        attempt = int(run.data.tags.get("lidit.attempt", "1")) + 1
        tags = {**tags, **{f"changed.{k}": v for k, v in changed.items()}, "lidit.attempt": str(attempt)}
        client.update_run(run.info.run_id, status="RUNNING")
        params, high_water = new, int(run.data.tags.get(STEP, "-1"))
    else:
        run = client.create_run(experiment_id, run_name=name, tags={RUN_KEY: key, "lidit.attempt": "1"})
        high_water = -1
    client.log_batch(
        run.info.run_id,
        params=[Param(k, v[:PARAM_LIMIT]) for k, v in params.items()],
        tags=[RunTag(k, v) for k, v in tags.items()],
    )
    return RunHandle(uri, run.info.run_id, high_water, str(spool))


class Tracker:
    """Logs into one run from a background thread. Every method returns at once."""

    def __init__(self, handle: RunHandle) -> None:
        self.handle = handle
        self.client = MlflowClient(handle.uri)
        self.spool = Path(handle.spool)
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_LENGTH)
        self._last_failure = -RETRY_SECONDS
        self._high_water = handle.high_water
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of a global step; steps that the run already has are left out."""
        if step <= self.handle.high_water:
            return
        record = {"step": step, "time": int(time.time() * 1000), "values": dict(values)}
        self._put(lambda: self._send_metrics(record))

    def tags(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._put(lambda key=key, value=value: self.client.set_tag(self.handle.run_id, key, value))  # type: ignore[misc]

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file, or everything in a folder. It is read later: leave it where it is."""
        send = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        self._put(lambda: send(self.handle.run_id, str(path), folder or None))

    def dataset(self, name: str, digest: str, source: str) -> None:
        """The corpus as the run's input: its digest is what training verified."""
        from mlflow.entities import Dataset, DatasetInput

        entry = Dataset(name=name, digest=digest[:36], source_type="local", source=json.dumps({"uri": source}))
        self._put(lambda: self.client.log_inputs(self.handle.run_id, [DatasetInput(entry, [])]))

    def register(self, name: str, artifact: str, alias: str) -> None:
        """The run's artifact folder as a new version of model `name`, found by `models:/name@alias`."""

        def send() -> None:
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            root = self.client.get_run(self.handle.run_id).info.artifact_uri
            made = self.client.create_model_version(name, f"{root}/{artifact}", self.handle.run_id)
            self.client.set_registered_model_alias(name, alias, made.version)

        self._put(send)

    def close(self, status: str = "") -> None:
        """Deliver what waits (spooling what cannot be), then set the run's status where one is given."""
        self._queue.put(None)
        self._thread.join(timeout=120)
        if status and self.handle.run_id:
            try:
                self.client.set_terminated(self.handle.run_id, status)
            except Exception as error:
                log.warning("the run's status %s could not be set: %s", status, _line(error))

    # -- the delivering thread ----------------------------------------------------------------------------------------

    def _put(self, send: Callable[[], None]) -> None:
        if not self.handle.run_id:
            return
        try:
            self._queue.put_nowait(send)
        except queue.Full:
            log.warning("tracking falls behind, %d entries wait: one was dropped", QUEUE_LENGTH)

    def _deliver(self) -> None:
        while (send := self._queue.get()) is not None:
            try:
                send()
            except Exception as error:  # see the module's promise
                self._last_failure = time.monotonic()
                log.warning("not tracked: %s", _line(error))
        self._flush_spool()

    def _send_metrics(self, record: dict[str, Any]) -> None:
        if time.monotonic() - self._last_failure >= RETRY_SECONDS and self._flush_spool() and self._log(record):
            return
        with self.spool.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _flush_spool(self) -> bool:
        """Send what an outage left behind, oldest first. True when nothing is left."""
        if not self.spool.exists():
            return True
        records = [json.loads(line) for line in self.spool.read_text().splitlines()]
        sent = 0
        while sent < len(records) and self._log(records[sent]):
            sent += 1
        if sent == len(records):
            self.spool.unlink()
            return True
        self.spool.write_text("".join(json.dumps(record) + "\n" for record in records[sent:]))
        return False

    def _log(self, record: dict[str, Any]) -> bool:
        metrics = [Metric(k, float(v), record["time"], record["step"]) for k, v in record["values"].items()]
        try:
            self.client.log_batch(self.handle.run_id, metrics=metrics)
            if record["step"] > self._high_water:
                self.client.set_tag(self.handle.run_id, STEP, str(record["step"]))
                self._high_water = record["step"]
        except Exception as error:
            if time.monotonic() - self._last_failure >= RETRY_SECONDS:
                log.warning("metrics wait in %s: %s", self.spool, _line(error))
            self._last_failure = time.monotonic()
            return False
        return True


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
