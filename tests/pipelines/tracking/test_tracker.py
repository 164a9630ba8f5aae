"""The tracker: one run over restarts, no doubled step, nothing lost when the server goes away,
never an exception.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from pydantic import ValidationError

from lidit import commit
from lidit.commit import git_state
from lidit.config import TrackingSettings
from pipelines import tracking
from pipelines.tracking import delivery, runs
from tests.helpers.servers import free_ports, healthy
from tests.helpers.waiting import wait_until


def tracked(uri: str, folder: Path, params: dict[str, str]):
    return tracking.tracked_run(uri, "test", "run", "key", params, {"lidit.job": "train"}, folder)


def steps(uri: str, run_id: str, metric: str = "loss") -> list[int]:
    return sorted(point.step for point in MlflowClient(uri).get_metric_history(run_id, metric))


def test_a_restart_continues_the_same_run(tmp_path: Path) -> None:
    uri = tracking.local_store(tmp_path)
    with (
        contextlib.suppress(RuntimeError),
        tracked(uri, tmp_path, {"lr": "1", "workers": "2"}) as first,
    ):
        for step in (10, 20, 30):
            first.metrics({"loss": 1.0}, step)
        raise RuntimeError("killed")
    assert MlflowClient(uri).get_run(first.handle.run_id).info.status == "FAILED"
    with tracked(uri, tmp_path, {"lr": "1", "workers": "1", "new": "x"}) as second:
        for step in (20, 30, 40):
            second.metrics({"loss": 2.0}, step)
    assert second.handle.run_id == first.handle.run_id
    assert steps(uri, first.handle.run_id) == [10, 20, 30, 40]
    run = MlflowClient(uri).get_run(first.handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "1", "workers": "2", "new": "x"}
    assert run.data.tags["changed.workers"] == "1"
    assert run.data.tags["lidit.attempt"] == "2"


def test_a_worker_started_again_doubles_nothing(tmp_path: Path) -> None:
    """Ray starts a killed worker with the handle of the first start; some metrics of its last step
    may be missing.
    """
    uri = tracking.local_store(tmp_path)
    with tracked(uri, tmp_path, {}) as driver:
        first = tracking.Tracker(driver.handle)
        for step in (10, 20, 30):
            first.metrics({"loss": 1.0}, step)
        first.close()
        (tmp_path / tracking.OUTBOX).write_text(
            json.dumps({"step": 40, "time": 1, "values": {"loss": 3.0}}) + '\n{"step": 50, "ti'
        )
        again = tracking.Tracker(driver.handle)
        for step in (20, 30, 40, 50):
            again.metrics({"loss": 2.0}, step)
        again.metrics({"validation": 4.0}, 30)
        again.close()
    assert steps(uri, driver.handle.run_id) == [10, 20, 30, 40, 50]
    assert steps(uri, driver.handle.run_id, "validation") == [30]
    assert driver.history("loss") == ([10.0, 20.0, 30.0, 40.0, 50.0], [1.0, 1.0, 1.0, 3.0, 2.0])


def test_the_commit_of_code_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(git_state()["git.commit"]) == 40
    monkeypatch.setenv("LIDIT_GIT_COMMIT", "c0ffee")
    assert git_state()["git.commit"] != "c0ffee"
    (tmp_path / "lidit").mkdir()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # somebody else's
    monkeypatch.setattr(commit, "__file__", str(tmp_path / "lidit" / "commit.py"))
    assert git_state() == {"git.commit": "c0ffee"}
    monkeypatch.delenv("LIDIT_GIT_COMMIT")
    assert git_state() == {}


@pytest.mark.parametrize("alias", ["latest", "v3", "12", "two words"])
def test_reserved_aliases_are_refused_before_anything_runs(alias: str) -> None:
    with pytest.raises(ValidationError, match="alias"):
        TrackingSettings(alias=alias)


def test_interrupted_is_not_failed(tmp_path: Path) -> None:
    uri = tracking.local_store(tmp_path)
    with pytest.raises(KeyboardInterrupt), tracked(uri, tmp_path, {}) as run:
        raise KeyboardInterrupt
    assert MlflowClient(uri).get_run(run.handle.run_id).info.status == "KILLED"


def test_a_tracker_that_is_down_from_the_start_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tracked("http://127.0.0.1:9", tmp_path, {"lr": "1"}) as run:
        run.metrics({"loss": 1.0}, 1)
        run.artifact(tmp_path)
    assert run.handle.run_id == ""
    assert "artifact" in caplog.text
    waiting = [json.loads(line) for line in (tmp_path / tracking.OUTBOX).read_text().splitlines()]
    assert [record["step"] for record in waiting if "values" in record] == [1]
    assert [record["artifact"] for record in waiting if "artifact" in record] == [str(tmp_path)]


def test_a_tracker_that_answers_later_gets_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, real = tracking.local_store(tmp_path / "store"), runs.MlflowClient
    (tmp_path / "note.txt").write_text("x")
    monkeypatch.setattr(runs, "MlflowClient", lambda uri: real("http://127.0.0.1:9"))
    tracker_context = tracked(uri, tmp_path, {"lr": "1"})
    run = tracker_context.__enter__()
    worker = tracking.Tracker(run.handle)
    worker.metrics({"loss": 1.0}, 1)
    worker.close()
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(runs, "MlflowClient", real)
    run.artifact(tmp_path / "note.txt")
    tracker_context.__exit__(None, None, None)
    assert steps(uri, run.handle.run_id) == [1]
    assert real(uri).get_run(run.handle.run_id).info.status == "FINISHED"
    assert [artifact.path for artifact in real(uri).list_artifacts(run.handle.run_id)] == [
        "note.txt"
    ]


@contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """A real `mlflow server` on loopback."""
    words = ["server", "--port", str(port), "--host", "127.0.0.1", "--workers", "1"]
    words += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--default-artifact-root",
        f"{folder}/artifacts",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: healthy(uri), seconds=120)
        yield uri
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.slow
def test_a_server_that_goes_away_gets_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "RETRY_SECONDS", 0.0)
    (port,) = free_ports(1)
    with server(tmp_path, port) as uri:
        run_id = runs.find_or_create(uri, runs.RunSpec("test", "run", "key", {}, {}, tmp_path))
        handle = tracking.RunHandle(uri, run_id, str(tmp_path / "outbox.jsonl"))
        tracker = tracking.Tracker(handle)
        tracker.metrics({"loss": 1.0}, 1)
        tracker.close()
    tracker = tracking.Tracker(handle)
    logging = threading.Thread(
        target=lambda: [tracker.metrics({"loss": 1.0}, step) for step in range(2, 50)]
    )
    logging.start()
    logging.join(timeout=20)
    assert not logging.is_alive(), "logging waits for a dead server"
    with server(tmp_path, port) as uri:
        tracker.close()
        assert steps(uri, handle.run_id) == list(range(1, 50))
    assert not (tmp_path / "outbox.jsonl").exists()


class _Maintenance(BaseHTTPRequestHandler):
    """A proxy that asks for an hour's patience."""

    def _answer(self) -> None:
        self.send_response(503)
        self.send_header("Retry-After", "3600")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_a_tracker_in_maintenance_does_not_hold_up_a_job(tmp_path: Path) -> None:
    """An hour of waiting would end the test by its limit."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Maintenance)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with tracked(f"http://127.0.0.1:{server.server_address[1]}", tmp_path, {}) as run:
            run.metrics({"loss": 1.0}, 1)
    finally:
        server.shutdown()
        server.server_close()
    assert '"loss": 1.0' in (tmp_path / tracking.OUTBOX).read_text()
