"""A store that answers is not away: what it refuses is told before the work, and what it would
refuse is mended.
"""

import logging
import shlex
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from pydantic import ValidationError

from lidit.config import TrackingSettings
from lidit.errors import InputError
from pipelines import tracking
from pipelines.tracking import tracker as tracker_module
from pipelines.tracking.store import sqlite_file


def tracked(uri: str, folder: Path, params: dict[str, str] | None = None, key: str = "key"):
    return tracking.tracked_run(uri, "test", "run", key, params or {}, {}, folder)


def test_a_deleted_experiment_is_told_before_the_work(tmp_path: Path) -> None:
    uri = tracking.local_store(tmp_path)
    with tracked(uri, tmp_path):
        pass
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("test").experiment_id
    client.delete_experiment(experiment)
    entered = []
    with (
        pytest.raises(InputError, match=f"deleted.*--experiment-id {experiment}"),
        tracked(uri, tmp_path, key="new"),
    ):
        entered.append(1)
    assert not entered
    with pytest.raises(InputError, match="deleted"):
        tracking.check_experiment(uri, "test")
    client.restore_experiment(experiment)
    tracking.check_experiment(uri, "test")
    states = [
        run.info.status for run in client.search_runs([experiment], run_view_type=ViewType.ALL)
    ]
    assert states == ["FINISHED"], "a refused start leaves no run behind"


def test_names_that_mlflow_refuses_are_written_in_its_letters(tmp_path: Path) -> None:
    uri = tracking.local_store(tmp_path)
    long = "x" * 300
    params = {
        "fields.a[0]": "1",
        "../up": "2",
        "a//b": "3",
        "plain.name": "4",
        long: "5",
        "é:ü/ß": "6",
    }
    with tracked(uri, tmp_path, params) as run:
        run.metrics({"two (objects)": 0.5, "loss": 1.0}, 1)
    data = MlflowClient(uri).get_run(run.handle.run_id).data
    assert data.metrics == {"two _objects_": 0.5, "loss": 1.0}
    expected = {
        "fields.a_0_": "1",
        "___up": "2",
        "a__b": "3",
        "plain.name": "4",
        "x" * 250: "5",
        "é:ü/ß": "6",
    }
    assert data.params == expected
    assert not (tmp_path / tracking.OUTBOX).exists()


@pytest.mark.parametrize("name", ["100%20of it, really?", "50% a#b&c"])
def test_a_store_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (tmp_path / "note.txt").write_text("x")
    uri = tracking.local_store(folder)
    with tracked(uri, folder) as run:
        run.artifact(tmp_path / "note.txt")
    # MLflow itself makes an empty folder of the encoded name.
    outside = [
        path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents
    ]
    assert outside == [tmp_path / "note.txt"]
    assert sqlite_file(uri) == folder / "mlflow.db"
    assert (folder / "mlflow.db").is_file()
    assert list(folder.rglob("note.txt"))
    assert shlex.split(tracking.open_command(uri)) == ["lidit", "ui", str(folder)]
    assert MlflowClient(uri).get_run(run.handle.run_id).info.status == "FINISHED"


def test_a_moved_folder_keeps_its_run_and_says_where_its_files_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = tmp_path / "runs", tmp_path / "elsewhere"
    (here / "a").mkdir(parents=True)
    with tracked(tracking.local_store(here), here / "a") as first:
        first.metrics({"loss": 1.0}, 1)
    (here / "a" / tracking.RUN_FILE).write_text(first.handle.run_id)
    shutil.copytree(here, there)
    with (
        caplog.at_level(logging.WARNING),
        tracked(tracking.local_store(there), there / "a", key="other") as second,
    ):
        second.metrics({"loss": 1.0}, 2)
    assert second.handle.run_id == first.handle.run_id
    history = MlflowClient(tracking.local_store(there)).get_metric_history(
        first.handle.run_id, "loss"
    )
    assert sorted(point.step for point in history) == [1, 2]
    assert f"go to {here / 'artifacts'}" in caplog.text
    # Another store does not know the run: it gets one of its own.
    with tracked(tracking.local_store(tmp_path), there / "a", key="other") as third:
        pass
    assert third.handle.run_id not in ("", first.handle.run_id)


def test_another_job_of_the_folder_has_a_run_of_its_own(tmp_path: Path) -> None:
    uri, folder = tracking.local_store(tmp_path), tmp_path / "arm"
    folder.mkdir()
    with tracking.tracked_run(
        uri, "test", "arm", "one", {}, {"lidit.job": "train"}, folder
    ) as training:
        pass
    (folder / tracking.RUN_FILE).write_text(training.handle.run_id)
    with tracking.tracked_run(
        uri, "test", "arm", "two", {}, {"lidit.job": "arm"}, folder
    ) as result:
        pass
    assert result.handle.run_id not in ("", training.handle.run_id)


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_is_told_and_one_that_is_busy_is_not(
    tmp_path: Path, status: int
) -> None:
    with answering(status) as uri:
        with pytest.raises(InputError, match=f"refuses.*{status}"), tracked(uri, tmp_path):
            pass
        with pytest.raises(InputError, match=f"refuses.*{status}"):
            tracking.check_experiment(uri, "test")
    with answering(429) as uri:
        tracking.check_experiment(uri, "test")
        with tracked(uri, tmp_path) as run:
            run.metrics({"loss": 1.0}, 1)
    assert '"loss": 1.0' in (tmp_path / tracking.OUTBOX).read_text()


def test_a_server_that_is_silent_does_not_hold_up_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes the connection and says nothing; the block runs all the same, while the thread still
    waits.
    """
    monkeypatch.setattr(tracker_module, "CONNECT_SECONDS", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with tracked(uri, tmp_path) as run:
            assert "has not answered in" in caplog.text
            assert not run._asked.is_set(), "the store was waited for"
            run.metrics({"loss": 1.0}, 1)
    assert '"loss": 1.0' in (tmp_path / tracking.OUTBOX).read_text()


def test_a_store_of_a_kind_that_mlflow_lacks_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ftp"):
        tracking.check_experiment("ftp://host/store", "test")


@pytest.mark.parametrize(
    "settings", [{"experiment": ""}, {"experiment": "x" * 501}, {"registered_model": "a/b"}]
)
def test_names_that_cannot_be_mended_are_refused_with_the_recipe(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        TrackingSettings(**settings)
