"""Replies that no Ray dashboard gives: each is one line, and nothing of them steers
the terminal.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lidit.errors import InputError, JobError
from pipelines.submission.follow import follow
from pipelines.submission.submit import Submission, connect, start, submit
from tests.helpers.probe_project import make_project

NAME = "lidit-probe-0"
JOB = {"type": "SUBMISSION", "submission_id": NAME, "entrypoint": "x", "status": "SUCCEEDED"}
Reply = Callable[[str], object]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.rstrip("/")
        replies: dict[str, object] = self.server.replies  # type: ignore[attr-defined]
        key = next((key for key in replies if path.endswith(key)), "/jobs/")
        reply = replies[key]
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def dashboard(job: object, version: object = None, logs: object = None) -> Iterator[str]:
    """A web server that answers every question about a job with `job`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.replies = {  # type: ignore[attr-defined]
        "/api/version": {"version": "4", "ray_version": "99.0.0", "ray_commit": "x"}
        if version is None
        else version,
        "/logs": {"logs": ""} if logs is None else logs,
        "/jobs/": job,
    }
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")


@pytest.fixture
def asked(tmp_path: Path) -> Submission:
    project = make_project(tmp_path / "project")
    return Submission("probe", (str(project / "recipe.yaml"),), project)


WRONG = [None, [], [JOB], 5, "FAILED", {}, {**JOB, "status": None}, {**JOB, "status": "RESTING"},
         {**JOB, "status": ["FAILED"]}, {**JOB, "driver_exit_code": "many"}]  # fmt: skip


@pytest.mark.parametrize("reply", WRONG, ids=str)
def test_a_reply_about_a_job_that_is_none_is_one_line(reply: object, asked: Submission) -> None:
    with dashboard(reply) as address:
        with pytest.raises(JobError, match="the cluster's reply cannot be understood") as caught:
            submit(asked, address)
        with pytest.raises(JobError, match=f"{NAME}: the cluster's reply cannot be understood"):
            follow(connect(address), NAME, lambda text: None)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "reply", [[None], [], 7, {"ray_version": None}, {"ray_version": "new"}, {"version": "1"}]
)
def test_what_is_no_dashboard_is_told_at_once(reply: object) -> None:
    with (
        dashboard(JOB, version=reply) as address,
        pytest.raises(InputError, match="no Ray dashboard") as caught,
    ):
        connect(address)
    assert len(str(caught.value).splitlines()) == 1


def test_a_web_page_in_the_place_of_a_reply_is_one_line(asked: Submission) -> None:
    with (
        dashboard(b"<html>Sign in</html>") as address,
        pytest.raises(JobError, match="does not answer as it should"),
    ):
        submit(asked, address)


def test_attempts_that_all_failed_come_to_an_end(
    asked: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.submission.submit.MOST_ATTEMPTS", 7)
    with dashboard({**JOB, "status": "FAILED"}) as address:
        client = connect(address)
        with pytest.raises(JobError, match="7 attempts have failed"):
            start(client, asked)


@pytest.mark.parametrize(("code", "expected"), [(0, 1), (3, 3), (256, 1), (-9, 1), (None, 1)])
def test_a_failed_job_never_ends_as_a_success(code: int | None, expected: int) -> None:
    with dashboard({**JOB, "status": "FAILED", "driver_exit_code": code}) as address:
        assert follow(connect(address), NAME, lambda text: None) == expected


def test_logs_and_messages_cannot_steer_the_terminal(
    asked: Submission, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {**JOB, "status": "FAILED", "message": "no room\x1b]0;owned\x07\x9b2J"}
    replies = {**job, "status": "SUCCEEDED", "message": "a\x1b[2Jb"}
    with dashboard(
        replies, logs={"logs": "one\x1b[31m red\x1b[0m\ntwo\x1b[1A\x1b]52;c;x\x07\r\u202etxt\n"}
    ) as address:
        assert submit(asked, address) == 0
    captured = capsys.readouterr()
    assert captured.out == "one red\ntwo\\x1b[1A\\x1b]52;c;x\\x07\\r\\u202etxt\n"
    assert "a\\x1b[2Jb" in captured.err
    assert "\x1b" not in captured.err
