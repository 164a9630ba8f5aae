"""Submitting: what identifies a job, and what is refused before anything is sent."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_factory import make_corpus
from probe_project import PROBE, make_project

from jobs.submit import corpus_digest
from lidit.errors import InputError
from pipelines.submit import Submission, ask_on_terminal, code_version, connect


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.com"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def submission(project: Path, *overrides: str, job: str = "probe") -> Submission:
    return Submission(job, (str(project / "recipe.yaml"), *overrides), project)


def test_the_id_is_the_same_for_the_same_thing_and_another_for_any_difference(project: Path) -> None:
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "one")
    first = submission(project).submission_id
    assert re.fullmatch(r"lidit-probe-[0-9a-f]{16}", first)
    assert submission(project).submission_id == first
    (project / "notes.txt").write_text("not code")
    assert submission(project).submission_id == first

    seen = {first, submission(project, "train.lr=1").submission_id, submission(project, "train.l", "r=1").submission_id}
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
    asked = Submission("probe", (str(project / "recipe.yaml"), "name=a b; rm -rf"), project, corpus_digest="abc")
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
    for url in ("https://me:hunter2@mlflow.example.com", "redis://:hunter2@h/0"):  # with a user's name and without
        with pytest.raises(InputError, match=r"tracking\.uri: a URL with a password") as caught:
            submission(project, f"tracking.uri={url}")
        assert "hunter2" not in str(caught.value)
    whole = (project / "recipe.yaml").read_text()
    for url in ("https://me:hunter2@mlflow.example.com", "redis://:hunter2@h/0"):
        (project / "recipe.yaml").write_text(f"{whole}\nuri: {url}")
        with pytest.raises(InputError, match=r"recipe\.yaml: a URL with a password"):
            submission(project)


def test_addresses_that_cannot_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for address in ("auto", "ray://127.0.0.1:10001", "127.0.0.1:8265"):
        with pytest.raises(InputError, match="dashboard's URL"):
            connect(address)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
    first, second = make_corpus(tmp_path / "first", [["a cat"]]), make_corpus(tmp_path / "second", [["a dog"]])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"corpus: {tmp_path / 'first'}")
    assert first.digest != second.digest
    assert corpus_digest((str(recipe), "train.steps=3")) == first.digest
    assert corpus_digest((str(recipe), f"corpus={tmp_path / 'second'}")) == second.digest
    assert corpus_digest((str(tmp_path / "second"), "--encoder", "smollm2")) == second.digest
    assert corpus_digest((str(tmp_path), "corpus=nowhere")) is None
