"""Files and registrations: slow ones arrive, a model is never registered without its files, what is
owed arrives later.

Against a real sqlite store, and against a small HTTP server that stands for an MLflow server with a
slow bucket.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines import tracking
from pipelines.tracking import delivery
from tests.helpers.waiting import wait_until

ROOT = "mlflow-artifacts:/1/run/artifacts"


class SlowServer(ThreadingHTTPServer):
    """Answers a file after `delay` seconds, as a proxy does that sends it on first. `calls`: what
    came, in order.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, delay: float) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.delay, self.calls, self.closed = delay, list[str](), threading.Event()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: SlowServer

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if self.command == "PUT":
            self.server.calls.append(f"begun {path.rpartition('/artifacts/')[2]}")
            self.server.closed.wait(self.server.delay)
        self.server.calls.append(
            path.rpartition("/artifacts/" if self.command == "PUT" else "/mlflow/")[2]
        )
        info = {
            "run_id": "run",
            "artifact_uri": ROOT,
            "status": "RUNNING",
            "lifecycle_stage": "active",
        }
        version = {"name": "lidit", "version": "1", "status": "READY"}
        answer = {"run": {"info": info, "data": {}}, "model_version": version}
        body = json.dumps(
            {**answer, "run_info": info, "registered_model": {"name": "lidit"}}
        ).encode()
        try:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # nobody waits for it any more
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def slow_server(delay: float) -> Iterator[SlowServer]:
    server = SlowServer(delay)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closed.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "model"
    (folder / "parts").mkdir(parents=True)
    for file in ("config.json", "parts/1.safetensors", "parts/2.safetensors"):
        (folder / file).write_bytes(b"x" * 1000)
    return folder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What metrics wait for an answer; the files' patience is their own."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def driver(server: SlowServer, folder: Path) -> tracking.Tracker:
    handle = tracking.RunHandle(server.uri, "run", str(folder / tracking.OUTBOX))
    return tracking.Tracker(handle, lambda: handle)


def waiting(folder: Path) -> list[str]:
    """Kinds of what is owed."""
    path = folder / tracking.OUTBOX
    return (
        [next(iter(json.loads(line))) for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def tracked(uri: str, folder: Path):
    return tracking.tracked_run(uri, "test", "run", "key", {}, {}, folder)


@pytest.mark.usefixtures("impatient")
def test_a_file_may_take_longer_than_other_calls_and_close_waits_while_files_arrive(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "FILE_SECONDS", 10.0)
    monkeypatch.setattr(delivery, "CLOSE_SECONDS", 1.5)
    with slow_server(delay=2.0) as server:
        tracker = driver(server, model.parent)
        tracker.artifact(model, "model")
        tracker.register("lidit", "model", "newest")
        assert "model/config.json" not in server.calls, "training waited for the tracker"
        tracker.close("FINISHED")
    told = ("model/", "registered-models/alias", "runs/update")
    assert [call for call in server.calls if call.startswith(told)] == [
        "model/config.json",
        "model/parts/1.safetensors",
        "model/parts/2.safetensors",
        "registered-models/alias",
        "runs/update",
    ]
    assert waiting(model.parent) == []


@pytest.mark.usefixtures("impatient")
def test_a_server_that_never_answers_is_given_up_and_everything_is_kept(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "FILE_SECONDS", 3.0)
    monkeypatch.setattr(delivery, "CLOSE_SECONDS", 0.5)
    folder = model.parent
    with slow_server(delay=60.0) as server:
        tracker = driver(server, folder)
        tracker.artifact(model, "model")
        tracker.register("lidit", "model", "newest")
        tracker.metrics({"loss": 1.0}, 7)
        closing = threading.Thread(target=tracker.close, args=("FINISHED",))
        closing.start()
        wait_until(lambda: "begun model/config.json" in server.calls, seconds=10)
        assert waiting(folder) == ["artifact", "register", "step"], (
            "a kill now would lose the model"
        )
        closing.join(timeout=20)
        assert not closing.is_alive(), "the run's end waits for a file that nobody takes"
        assert "registered-models/alias" not in server.calls
    assert "given up" in caplog.text
    assert f"artifact {model}, registration of model lidit, metrics" in caplog.text
    assert set(waiting(folder)) == {"artifact", "register", "step"}
    with slow_server(delay=0.0) as server:
        driver(server, folder).close("FINISHED")
        assert server.calls.index("model/config.json") < server.calls.index(
            "registered-models/alias"
        )
        assert server.calls.count("model/config.json") == 1
    assert waiting(folder) == []


def test_a_model_is_registered_when_its_files_are_there_and_a_later_start_delivers_both(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri, folder = tracking.local_store(tmp_path), model.parent
    (tmp_path / "artifacts").write_text("in the way of the store's files")
    with tracked(uri, folder) as run:
        run.artifact(model, "model")
        run.register("lidit", "model", "newest")
    client = MlflowClient(uri)
    with pytest.raises(MlflowException):
        client.get_model_version_by_alias("lidit", "newest")
    assert waiting(folder) == ["artifact", "register"]
    assert "did not take everything" in caplog.text
    (tmp_path / "artifacts").unlink()
    with tracked(uri, folder):
        pass  # as `drive` does for a finished run
    version = client.get_model_version_by_alias("lidit", "newest")
    assert version.run_id == run.handle.run_id
    assert {path.name for path in Path(version.source.removeprefix("file://")).iterdir()} == {
        "config.json",
        "parts",
    }
    assert client.get_run(run.handle.run_id).info.status == "FINISHED"
    assert not (folder / tracking.OUTBOX).exists()


def test_what_a_worker_could_not_deliver_is_the_drivers(tmp_path: Path) -> None:
    uri, picture = tracking.local_store(tmp_path), tmp_path / "step-1.png"
    picture.write_bytes(b"png")
    with tracked(uri, tmp_path) as run:
        worker = tracking.Tracker(tracking.RunHandle(uri, "no such run", run.handle.outbox))
        worker.artifact(picture, "samples")
        worker.close()
        assert waiting(tmp_path) == ["artifact"]
        again = tracking.Tracker(run.handle)
        again.metrics({"loss": 1.0}, 1)
        again.close()
        assert waiting(tmp_path) == ["artifact"], "files are for the driver's end"
    client = MlflowClient(uri)
    assert [file.path for file in client.list_artifacts(run.handle.run_id, "samples")] == [
        "samples/step-1.png"
    ]
    assert not (tmp_path / tracking.OUTBOX).exists()


def test_files_that_are_gone_do_not_wait_for_ever_nor_does_their_registration(
    tmp_path: Path,
) -> None:
    uri = tracking.local_store(tmp_path)
    with tracked(uri, tmp_path) as run:
        run.artifact(tmp_path / "model", "model")
        run.register("lidit", "model", "newest")
        run.metrics({"loss": 1.0}, 1)
    assert not (tmp_path / tracking.OUTBOX).exists()
    assert run.history("loss") == ([1.0], [1.0])
    with pytest.raises(MlflowException):
        MlflowClient(uri).get_model_version_by_alias("lidit", "newest")
