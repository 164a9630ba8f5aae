"""Submitting: what identifies a job, and what is refused before anything is sent."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from ray.job_submission import JobSubmissionClient

from jobs.main import app
from jobs.submit import asked_for, corpus_digest, module_of
from lidit.errors import InputError, JobError
from pipelines.submission.follow import ask_on_terminal
from pipelines.submission.submit import Driver, Submission, code_version, connect, start
from tests.helpers.command import lidit
from tests.helpers.corpus_factory import make_corpus
from tests.helpers.probe_project import PROBE, make_project


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.com"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def submission(project: Path, *overrides: str, job: str = "probe") -> Submission:
    return Submission(job, (str(project / "recipe.yaml"), *overrides), project)


def test_the_id_is_the_same_for_the_same_thing_and_another_for_any_difference(
    project: Path,
) -> None:
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "one")
    first = submission(project).submission_id
    assert re.fullmatch(r"lidit-probe-[0-9a-f]{16}", first)
    assert submission(project).submission_id == first
    (project / "notes.txt").write_text("not code")
    assert submission(project).submission_id == first

    seen = {
        first,
        submission(project, "train.lr=1").submission_id,
        submission(project, "train.l", "r=1").submission_id,
    }
    (project / "jobs" / "probe.py").write_text(PROBE + "# changed\n")
    seen.add(submission(project).submission_id)
    git(project, "commit", "-qam", "two")
    seen.add(submission(project).submission_id)
    (project / "recipe.yaml").write_text((project / "recipe.yaml").read_text() + "\n# a comment")
    seen.add(submission(project).submission_id)
    (project / "jobs" / "other.py").touch()
    seen.add(submission(project, job="other").submission_id)
    (project / "llm.yaml").write_text("name: a")
    (project / "recipe.yaml").write_text("encoders: [llm.yaml]")
    seen.add(submission(project).submission_id)
    (project / "llm.yaml").write_text("name: b")
    seen.add(submission(project).submission_id)
    assert len(seen) == 9


def test_code_version_is_the_commit_when_clean_and_says_when_not(project: Path) -> None:
    without = code_version(project)
    assert re.fullmatch(r"no-git-[0-9a-f]{12}", without)
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "one")
    clean = code_version(project)
    assert re.fullmatch(r"[0-9a-f]{40}", clean)
    (project / "jobs" / "new.py").write_text("x = 1\n")
    assert re.fullmatch(clean + r"-[0-9a-f]{12}", code_version(project))


def test_entrypoint_and_metadata(project: Path) -> None:
    asked = Submission(
        "probe", (str(project / "recipe.yaml"), "name=a b; rm -rf"), project, corpus_digest="abc"
    )
    assert asked.entrypoint == "python -m jobs.probe recipe.yaml 'name=a b; rm -rf'"
    assert asked.metadata["lidit.corpus_digest"] == "abc"
    assert asked.metadata["git.commit"] == code_version(project)
    assert set(asked.metadata) == {
        "lidit.job",
        "lidit.sha256.recipe.yaml",
        "lidit.corpus_digest",
        "git.commit",
    }


def test_what_is_refused_before_anything_is_sent(project: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.yaml"
    outside.write_text("a: 1")
    with pytest.raises(InputError, match="no such file"):
        Submission("probe", (str(project / "none.yaml"),), project)
    with pytest.raises(InputError, match="must lie inside"):
        Submission("probe", (str(outside),), project)
    with pytest.raises(InputError, match="not the name of a job"):
        submission(project, job="probe; rm")
    # with a user's name and without
    for url in ("https://me:hunter2@mlflow.example.com", "redis://:hunter2@h/0"):
        with pytest.raises(InputError, match=r"tracking\.uri: a URL with a password") as caught:
            submission(project, f"tracking.uri={url}")
        assert "hunter2" not in str(caught.value)
    whole = (project / "recipe.yaml").read_text()
    for url in ("https://me:hunter2@mlflow.example.com", "redis://:hunter2@h/0"):
        (project / "recipe.yaml").write_text(f"{whole}\nuri: {url}")
        with pytest.raises(InputError, match=r"recipe\.yaml: a URL with a password"):
            submission(project)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_addresses_that_cannot_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for address in ("auto", "ray://127.0.0.1:10001", "127.0.0.1:8265"):
        with pytest.raises(InputError, match="dashboard's URL"):
            connect(address)
    port = closed_port()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="no token can be read"):
        connect(f"http://127.0.0.1:{port}")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    with pytest.raises(InputError, match=f"127.0.0.1:{port}: no Ray dashboard answers"):
        connect(f"http://127.0.0.1:{port}")


def test_without_a_terminal_ctrl_c_leaves_the_job_running(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert ask_on_terminal() is False


def test_the_corpus_a_command_names_is_recorded(tmp_path: Path) -> None:
    first, second = (
        make_corpus(tmp_path / "first", [["a cat"]]),
        make_corpus(tmp_path / "second", [["a dog"]]),
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"corpus: {tmp_path / 'first'}")
    assert first.digest != second.digest
    assert corpus_digest((str(recipe), "train.steps=3")) == first.digest
    assert corpus_digest((str(recipe), f"corpus={tmp_path / 'second'}")) == second.digest
    assert corpus_digest((str(tmp_path / "second"), "--encoder", "smollm2")) == second.digest
    assert corpus_digest((str(tmp_path), "corpus=nowhere")) is None


class FakeClient:
    """Ray's client as far as `start` needs it: knows one job at most, and may refuse
    a submission.
    """

    def __init__(self, status: str | None = None, refusal: Exception | None = None) -> None:
        self.status, self.refusal = status, refusal
        self.asked: dict[str, object] = {}

    def get_job_status(self, name: str) -> str:
        if self.status is None or name.endswith("-2"):
            raise RuntimeError("Request failed with status code 404: no such job")
        return self.status

    def submit_job(self, **asked: object) -> None:
        self.asked = asked
        if self.refusal:
            raise self.refusal


def test_what_the_driver_asks_for_is_recorded_and_no_part_of_the_identity(project: Path) -> None:
    plain = submission(project)
    seated = dataclasses.replace(
        plain, driver=Driver(gpus=1, cpus=2.5, labels={"lidit/pool": "large"})
    )
    assert seated.submission_id == plain.submission_id
    assert "lidit.driver" not in plain.metadata
    assert seated.metadata["lidit.driver"] == "gpus 1, cpus 2.5, lidit/pool=large"
    nothing, something = FakeClient(), FakeClient()
    assert start(nothing, plain) == (plain.submission_id, True)  # type: ignore[arg-type]
    assert start(something, seated) == (plain.submission_id, True)  # type: ignore[arg-type]
    assert not [name for name in nothing.asked if name.startswith("entrypoint_")]
    assert {
        name: asked for name, asked in something.asked.items() if name.startswith("entrypoint_")
    } == {
        "entrypoint_num_gpus": 1,
        "entrypoint_num_cpus": 2.5,
        "entrypoint_label_selector": {"lidit/pool": "large"},
    }
    real = inspect.signature(JobSubmissionClient.submit_job).parameters
    assert set(something.asked) <= set(real)
    for status in ("PENDING", "RUNNING", "SUCCEEDED"):  # never a second one beside it
        assert start(FakeClient(status), seated) == (plain.submission_id, False)  # type: ignore[arg-type]
    assert start(FakeClient("FAILED"), seated) == (f"{plain.submission_id}-2", True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "Request failed with status code 500: ... Package size (600.00MiB) exceeds the maximum "
        "size of 512.00MiB. To",
        "Request failed with status code 500: ... Maximum request body size 104857600 exceeded.",
    ],
)
def test_a_folder_that_is_too_large_is_one_line(project: Path, text: str) -> None:
    with pytest.raises(
        InputError, match=r"too large to be sent .* move .*, or name it in " r"\.gitignore"
    ) as caught:
        start(FakeClient(refusal=RuntimeError(text)), submission(project))  # type: ignore[arg-type]
    assert str(project) in str(caught.value)
    with pytest.raises(JobError, match="the cluster refused the job: something else"):
        start(FakeClient(refusal=RuntimeError("something else")), submission(project))  # type: ignore[arg-type]
    with pytest.raises(JobError, match="the connection broke while the folder was sent"):
        start(FakeClient(refusal=ConnectionError("reset")), submission(project))  # type: ignore[arg-type]


def test_jobs_are_found_by_the_name_people_type(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    assert module_of("train-codec") == module_of("train_codec") == "train_codec"
    assert module_of("demo-pictures") == "demo_pictures"
    with pytest.raises(
        InputError,
        match=r"'trian': no such job in jobs/; one of .*train, train-codec, tune-sampler, verify",
    ):
        module_of("trian")
    for other in ("recipe", "start", "submit", "main"):
        with pytest.raises(InputError, match="no such job"):
            module_of(other)
    monkeypatch.chdir(project)
    assert module_of("probe") == "probe"
    monkeypatch.chdir(project.parent)
    with pytest.raises(InputError, match="start from the root of the checkout"):
        module_of("probe")


def parsed(*words: str) -> tuple[Submission, str | None]:
    """What `lidit submit` with these words would send, and where to."""
    command = typer.main.get_command(app).commands["submit"]  # type: ignore[attr-defined]
    context = command.make_context("submit", list(words))
    address = context.params.pop("address")
    return asked_for(arguments=context.args, **context.params), address


def test_options_before_the_job_are_ours_and_those_behind_it_the_jobs(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    ours = ["--gpus", "1", "--node-label", "lidit/pool=large"]
    sent = [*ours, "probe", "recipe.yaml", "--gpus", "8", "--node-label", "a=b"]
    asked, address = parsed("--address", "http://h:1", *sent)
    assert address == "http://h:1"
    assert asked.job == "probe"
    assert asked.driver == Driver(gpus=1, labels={"lidit/pool": "large"})
    assert asked.arguments == ("recipe.yaml", "--gpus", "8", "--node-label", "a=b")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    nobody = f"http://127.0.0.1:{closed_port()}"
    for words, told in (
        # this one would be sent
        (["--address", nobody, *sent], f"{nobody}: no Ray dashboard answers"),
        (["probe", "recipe.yaml", "--address", nobody], "give --address URL before the job"),
        (["--address", nobody, "--node-label", "pool", "probe"], "a label is KEY=VALUE"),
        (["--adress", nobody, "probe"], "No such option: --adress"),
    ):
        assert lidit("submit", *words) == 2
        assert told in capsys.readouterr().err
