"""The tracker: MLflow behind one small class.

The driver finds or creates one run per job (tag `lidit.run_key`), owns its status and hands its id
to the workers; rank 0 logs into it. Steps that the store already holds of a metric are left out, so
a resumed run continues its curve without doubled or lost points. A store that is away stops
nothing, see `delivery`; one that answers with a refusal is told before the job's work begins.
"""

from __future__ import annotations

import json
import logging
import mimetypes
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.utils.rest_utils import augmented_raise_for_status, http_request

from lidit.errors import InputError, one_line
from pipelines.tracking.delivery import Delivery, GoneError, Record, files_in, patience
from pipelines.tracking.images import send_image, show_in_description
from pipelines.tracking.inputs import DIGEST_LENGTH, InputData
from pipelines.tracking.logged_model import create_logged_model, finish_logged_model, logged_model
from pipelines.tracking.runs import RunHandle, RunSpec, accepted_name, find_or_create, history
from pipelines.tracking.store import sign_in, sqlite_file

STEP = "lidit.step"
CONTEXT = "mlflow.data.context"
MODEL = "model"  # the LoggedModel of a training
OUTBOX = "tracking.spool.jsonl"  # the name is part of a run's folder: earlier releases wrote it
# A start waits this long for the store's answer: a server's, and a file's, whose tables may have to
# be created.
CONNECT_SECONDS = 15.0
CREATE_SECONDS = 120.0

log = logging.getLogger(__name__)


@contextmanager
def tracked_run(
    uri: str,
    experiment: str,
    name: str,
    key: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    folder: Path,
) -> Iterator[Tracker]:
    """The run with this key: continued where it exists, created where not; FINISHED, FAILED or
    KILLED at the end.

    The arguments are what identifies the run and what it holds, in MLflow's words. A store that
    does not answer is reported once and the job goes on with an outbox file. Raises InputError
    where the store answers and refuses the run (a deleted experiment, a user without permission),
    before the block is entered.
    """
    sign_in(uri)
    spec = RunSpec(experiment, name, key, params, tags, folder)
    handle = RunHandle(uri, "", str(folder / OUTBOX))
    tracker = Tracker(handle, lambda: find_or_create(uri, spec))
    tracker.wait_until_answered(CREATE_SECONDS if sqlite_file(uri) else CONNECT_SECONDS)
    try:
        yield tracker
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    tracker.close("FINISHED")


class _ProxiedArtifacts(MlflowArtifactsRepository):
    """A server's artifacts, each file with its own patience: MLflow has one timeout
    for all calls.
    """

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        # pieces, straight to the bucket: nobody waits for a proxy
        if self._should_multipart_upload(local_file):
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
    """Logs into one run from a background thread. Every method but `close` and
    `wait_until_answered` returns at once.

    `connect` gives the id of the run, and is called by that thread; only the driver has it. What a
    worker could not deliver, but metrics, is left to the driver, which holds no GPUs while it
    waits.
    """

    def __init__(self, handle: RunHandle, connect: Callable[[], str] | None = None) -> None:
        self.handle, self._connect = handle, connect
        self._asked = threading.Event()  # the store has answered once, or failed to
        self._refusal: InputError | None = None
        self._newest: dict[str, int] = {}  # metric -> highest step the store has of it
        if handle.run_id:
            # A worker that is killed early has delivered its first figures all the same.
            with suppress(Exception):
                self.client  # noqa: B018
        self._delivery = Delivery(
            Path(handle.outbox), self._send, self._is_connected, connect is not None
        )

    @cached_property
    def client(self) -> MlflowClient:
        """Made when it is needed: a sqlite store's tables are created with it."""
        return MlflowClient(self.handle.uri)

    def wait_until_answered(self, seconds: float) -> None:
        """Wait for the run's id, but not for long. Raises InputError where the store refuses the
        run.
        """
        answered = self._asked.wait(seconds)
        if self._refusal:
            self._delivery.abandon()
            raise self._refusal
        if not answered:
            log.warning(
                "the tracker has not answered in %.0f s, metrics wait in %s",
                seconds,
                self.handle.outbox,
            )

    def metrics(self, values: Mapping[str, float], step: int, of_run: str = "") -> None:
        """Metrics of a global step; those that the run already has at this or a later step are left
        out.

        of_run: the training whose model they are scores of, in the same store.
        """
        accepted = {accepted_name(name): value for name, value in values.items()}
        of = {"of": of_run} if of_run else {}
        self._delivery.put(
            {"step": step, "time": int(time.time() * 1000), "values": accepted, **of}
        )

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file, or everything in a folder. It is read later: leave it where it is."""
        self._delivery.put({"artifact": str(path.absolute()), "folder": folder})

    def image(self, path: Path, key: str, step: int) -> None:
        """A picture of a step: MLflow shows the pictures of one key with a slider over steps."""
        self._delivery.put({"image": str(path.absolute()), "key": key, "step": step})

    def picture(self, path: Path) -> None:
        """A picture that the run's description shows; among its artifacts under its own name."""
        self._delivery.put({"picture": str(path.absolute())})

    def dataset(self, data: InputData, context: str = "training") -> None:
        """What the run reads; the corpus's digest is what training verified."""
        digest, told = (
            data.digest[:DIGEST_LENGTH],
            {"schema": dict(data.schema), "profile": dict(data.profile)},
        )
        kind = {"source": data.source, "type": data.source_type, "context": context}
        self._delivery.put({"dataset": data.name, "digest": digest, **kind, **told})

    def model(self, path: Path, name: str, step: int) -> None:
        """A file, or everything in a folder, of the run's LoggedModel `name` of this step."""
        self._delivery.put({"artifact": str(path.absolute()), "folder": name, "model_step": step})

    def model_is_whole(self, name: str, step: int) -> None:
        """Mark the LoggedModel as ready once everything logged into it has arrived."""
        self._delivery.put({"whole": name, "model_step": step})

    def register(self, name: str, artifact: str, alias: str, description: str = "") -> None:
        """The run's model or artifact folder as a new version of `name`, found by
        `models:/name@alias`.

        Not before everything logged into that folder has arrived: people load what the alias points
        at.
        """
        self._delivery.put(
            {"register": name, "from": artifact, "alias": alias, "description": description}
        )

    def history(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and values the store holds of a metric, in order; empty where it
        does not answer.
        """
        try:
            points = history(self.client, self.handle.run_id, metric) if self.handle.run_id else []
        except Exception as error:
            log.warning("the history of %s could not be read: %s", metric, one_line(error, 200))
            points = []
        return [float(step) for step, _ in points], [value for _, value in points]

    def known(self, prefix: str) -> list[str]:
        """Names of the run's metrics that start with `prefix`, sorted; none where the store does
        not answer.
        """
        try:
            names = (
                self.client.get_run(self.handle.run_id).data.metrics if self.handle.run_id else {}
            )
        except Exception as error:
            log.warning("the run's metrics could not be listed: %s", one_line(error, 200))
            names = {}
        return sorted(name for name in names if name.startswith(prefix))

    def close(self, status: str = "") -> None:
        """Deliver what waits, keep the rest in the outbox, then set the run's status where `status`
        names it.

        Waits as long as things arrive, and for a file as long as its size allows.
        """
        self._delivery.close()
        if status and self.handle.run_id:
            try:
                self.client.set_terminated(self.handle.run_id, status)
            except Exception as error:
                log.warning(
                    "the run's status %s could not be set: %s", status, one_line(error, 200)
                )

    # -- called by the delivering thread -----------------------------------------------------------

    def _is_connected(self, at_end: bool) -> bool:
        """Whether there is a run to log into. The driver asks once at the start and once more at
        the end.
        """
        if self._connect and not self.handle.run_id and (at_end or not self._asked.is_set()):
            try:
                self.handle = replace(self.handle, run_id=self._connect())
            except InputError as error:
                self._refusal = error
                if self._asked.is_set():
                    log.warning("%s", error)
            except Exception as error:
                # a store that is away must not stop a job, whatever MLflow raises
                log.warning(
                    "the tracker does not answer, metrics wait in %s: %s",
                    self.handle.outbox,
                    one_line(error, 200),
                )
            finally:
                self._asked.set()
        return bool(self.handle.run_id)

    def _send(self, record: Record) -> None:
        """Raises whatever the tracker's client raises, and GoneError."""
        match record:
            case {"values": values, "step": step, "time": when}:
                self._send_metrics(values, step, when, record.get("of", ""))
            case {"artifact": path, "folder": name, "model_step": step}:
                made = create_logged_model(self.client, self.handle.run_id, name, step)
                self._send_files(Path(path), "", made.artifact_location)
            case {"artifact": path, "folder": folder}:
                self._send_files(
                    Path(path), folder, self.client.get_run(self.handle.run_id).info.artifact_uri
                )
            case {"picture": path}:
                root = self.client.get_run(self.handle.run_id).info.artifact_uri
                self._send_files(Path(path), "", root)
                show_in_description(self.client, self.handle.run_id, Path(path).name)
            case {"image": path, "key": key, "step": step}:
                send_image(self.client, self.handle.run_id, Path(path), key, step)
            case {"whole": name, "model_step": step}:
                self._delivery.require_arrived(name)
                made = create_logged_model(self.client, self.handle.run_id, name, step)
                finish_logged_model(self.client, self.handle.run_id, made)
            # An outbox of an earlier release says "of" for "from".
            case {"register": name, "from": folder, "alias": alias} | {
                "register": name,
                "of": folder,
                "alias": alias,
            }:
                self._register(name, folder, alias, record.get("description", ""))
            case {"dataset": name, "digest": digest, "source": source}:
                self._send_dataset(name, digest, source, record)
            case _:
                raise ValueError(f"not known here: {record}")

    def _send_metrics(self, values: Mapping[str, float], step: int, when: int, of_run: str) -> None:
        """Without what the store has already."""
        fresh = {
            key: float(value) for key, value in values.items() if step > self._newest_step(key)
        }
        if fresh:
            model = logged_model(self.client, of_run, MODEL) if of_run else None
            model_id = model.model_id if model else None
            metrics = [Metric(key, value, when, step, model_id) for key, value in fresh.items()]
            self.client.log_batch(
                self.handle.run_id, metrics=metrics, tags=[RunTag(STEP, str(step))]
            )
        self._newest.update(dict.fromkeys(fresh, step))

    def _send_dataset(self, name: str, digest: str, source: str, record: Record) -> None:
        entry = Dataset(
            name=name,
            digest=digest,
            source_type=record.get("type", "local"),
            source=json.dumps({"uri": source}),
            schema=json.dumps(record.get("schema", {})),
            profile=json.dumps(record.get("profile", {})),
        )
        tags = [InputTag(CONTEXT, record.get("context", "training"))]
        self.client.log_inputs(self.handle.run_id, [DatasetInput(entry, tags)])

    def _send_files(self, path: Path, folder: str, root: str) -> None:
        """Send a file, or a folder's, into `folder` below the artifacts' address `root`."""
        if not path.exists():
            raise GoneError(f"{path} is no longer there")
        artifacts: ArtifactRepository = (
            _ProxiedArtifacts(root, self.handle.uri)
            if root.startswith("mlflow-artifacts:")
            else get_artifact_repository(root, self.handle.uri)
        )
        top = path if path.is_dir() else path.parent
        for file in files_in(path):
            inside = PurePosixPath(folder, file.parent.relative_to(top))
            with self._delivery.sending(file):
                artifacts.log_artifact(str(file), str(inside) if inside.parts else None)

    def _register(self, name: str, folder: str, alias: str, description: str) -> None:
        self._delivery.require_arrived(folder)
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        run_id = self.handle.run_id
        model = logged_model(self.client, run_id, folder)
        source = (
            model.artifact_location
            if model
            else f"{self.client.get_run(run_id).info.artifact_uri}/{folder}"
        )
        made = self.client.create_model_version(
            name,
            source,
            run_id,
            description=description,
            model_id=model.model_id if model else None,
        )
        self.client.set_registered_model_alias(name, alias, made.version)

    def _newest_step(self, metric: str) -> int:
        """Asked of the store itself, once per metric: a killed worker may have logged more than
        anybody noted.
        """
        if metric not in self._newest:
            points = self.client.get_metric_history(self.handle.run_id, metric)
            self._newest[metric] = max((point.step for point in points), default=-1)
        return self._newest[metric]
