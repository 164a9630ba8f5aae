"""Send a job to a Ray cluster once, follow it to its end, return its exit code.

The submission id is a function of the command, the bytes of the files it names and the code's
version, and Ray refuses
a used id: submitting the same thing twice follows the first one. A failed or stopped attempt is
followed by `ID-2`, `ID-3`, ... Token authentication is on unless RAY_AUTH_MODE says otherwise.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from lidit.config.passwords import has_password
from lidit.config.settings import load_yaml
from lidit.errors import InputError, JobError, one_line, plain
from pipelines.submission.dashboard import CONNECTION_ERRORS, connect, token_error, understood
from pipelines.submission.follow import INTERRUPTED, follow

JOB_NAME = re.compile(r"[a-z][a-z0-9_]*")
CODE_FOLDERS = ("lidit", "pipelines", "jobs")
MOST_ATTEMPTS = 1000
DRIVER = "lidit.driver"
# of the GCS, of the dashboard
TOO_LARGE = re.compile(r"exceeds the maximum size of|Maximum request body size")


@dataclass(frozen=True)
class Driver:
    """What the job's own process asks Ray for. Asking for nothing puts it on the head, which may
    have no GPU.

    No part of a job's identity: wherever it runs it does the same to the same folders, so two must
    never run at once.
    """

    gpus: float | None = None
    cpus: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """For `submit_job`."""
        asked = {
            "entrypoint_num_gpus": self.gpus,
            "entrypoint_num_cpus": self.cpus,
            "entrypoint_label_selector": dict(self.labels) or None,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def __str__(self) -> str:
        numbers = [
            f"{name} {n:g}"
            for name, n in (("gpus", self.gpus), ("cpus", self.cpus))
            if n is not None
        ]
        return ", ".join(
            [*numbers, *(f"{key}={value}" for key, value in sorted(self.labels.items()))]
        )


@dataclass(frozen=True)
class Submission:
    """What is asked for: `python -m jobs.JOB ARGUMENTS...` over the code and files in
    `working_dir`.

    Arguments that are files (recipes, encoder files) must lie in `working_dir`, which is what the
    cluster gets. Raises InputError for files elsewhere, and for a password where anyone could read
    it.
    """

    job: str
    arguments: tuple[str, ...]
    working_dir: Path = Path()
    corpus_digest: str | None = None
    driver: Driver = Driver()

    def __post_init__(self) -> None:
        if not JOB_NAME.fullmatch(self.job):
            raise InputError(f"{self.job!r} is not the name of a job, such as embed or train")
        for argument in self.arguments:
            path = Path(argument)
            if argument.endswith((".yaml", ".yml")) and not path.is_file():
                raise InputError(f"{argument}: no such file")
            if path.is_file() and not path.resolve().is_relative_to(self.working_dir.resolve()):
                raise InputError(
                    f"{argument}: the file must lie inside {self.working_dir.resolve()}, which "
                    "is what the cluster "
                    "gets; copy it there or start from its folder"
                )
            if has_password(argument):
                raise _password_error(
                    argument.partition("=")[0] if "=" in argument else "the arguments"
                )
        for path in self.files:
            if path.suffix in (".yaml", ".yml") and has_password(
                path.read_text("utf-8", "replace")
            ):
                raise _password_error(str(path))

    @property
    def files(self) -> list[Path]:
        """Every file the arguments name, and the encoder files that a recipe among them names
        beside itself.
        """
        found = [Path(argument) for argument in self.arguments if Path(argument).is_file()]
        for path in [path for path in found if path.suffix in (".yaml", ".yml")]:
            encoders = load_yaml(path).get("encoders") or []
            found += [
                path.parent / entry
                for entry in encoders
                if isinstance(entry, str) and (path.parent / entry).is_file()
            ]
        return found

    @property
    def entrypoint(self) -> str:
        """The command the cluster runs."""
        root = self.working_dir.resolve()
        words = [
            Path(word).resolve().relative_to(root).as_posix() if Path(word).is_file() else word
            for word in self.arguments
        ]
        return shlex.join(["python", "-m", f"jobs.{self.job}", *words])

    @property
    def submission_id(self) -> str:
        """The same for the same command, bytes of the files it names and code version; readable in
        a list of jobs.
        """
        parts = [self.entrypoint.encode(), code_version(self.working_dir).encode()]
        parts += [path.read_bytes() for path in self.files]
        digest = hashlib.sha256(
            b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        ).hexdigest()
        return f"lidit-{self.job}-{digest[:16]}"

    @property
    def metadata(self) -> dict[str, str]:
        """What the dashboard shows beside the job: never a secret."""
        facts = {"lidit.job": self.job, "git.commit": code_version(self.working_dir)}
        for path in self.files:
            facts[f"lidit.sha256.{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        facts |= {"lidit.corpus_digest": self.corpus_digest} if self.corpus_digest else {}
        return facts | ({DRIVER: str(self.driver)} if str(self.driver) else {})


def _password_error(where: str) -> InputError:
    return InputError(
        f"{where}: a URL with a password in it would be readable in the dashboard; "
        "give the password to the cluster's environment instead"
    )


def code_version(folder: Path) -> str:
    """The git commit; with uncommitted changes (or without git) a digest of code and shipped
    recipes is added.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        if not _git(folder, "status", "--porcelain", "--", *CODE_FOLDERS):
            return commit
    except (OSError, subprocess.CalledProcessError):
        commit = "no-git"
    digest = hashlib.sha256()
    for path in sorted(
        p
        for name in CODE_FOLDERS
        for p in (folder / name).rglob("*")
        if p.suffix in (".py", ".yaml")
    ):
        digest.update(
            f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0"
        )
    return f"{commit}-{digest.hexdigest()[:12]}"


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def start(client: JobSubmissionClient, submission: Submission) -> tuple[str, bool]:
    """(submission id, True when this call started it). A pending, running or succeeded one is not
    started again.
    """
    base = submission.submission_id
    for attempt in range(1, MOST_ATTEMPTS + 1):
        name = base if attempt == 1 else f"{base}-{attempt}"
        status = _status(client, name)
        if status in (JobStatus.FAILED, JobStatus.STOPPED):
            continue
        if status is not None:
            return name, False
        try:
            client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=name,
                runtime_env={
                    "working_dir": str(submission.working_dir),
                    # The cluster's copy of the code has no .git folder to ask.
                    "env_vars": {"LIDIT_GIT_COMMIT": code_version(submission.working_dir)},
                },
                metadata=submission.metadata,
                **submission.driver.options,
            )
            return name, True
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            if TOO_LARGE.search(str(error)):
                raise InputError(
                    f"{submission.working_dir.resolve()}: too large to be sent to the cluster "
                    "(zipped, Ray takes 100 "
                    "MiB); move what the job does not need out of this folder, or name it in "
                    ".gitignore or .rayignore"
                ) from None
            if _status(client, name) is None:
                raise JobError(
                    f"{name}: the cluster refused the job: {one_line(error, 400)}"
                ) from None
            return name, False  # somebody submitted the same thing in between
        except CONNECTION_ERRORS as error:
            raise JobError(
                f"{name}: the connection broke while the folder was sent "
                f"({type(error).__name__}); check the tunnel, "
                "and that the folder is below 100 MiB, then submit again"
            ) from None
    raise JobError(
        f"{base}: the cluster says that {MOST_ATTEMPTS:,} attempts have failed; check the address"
    )


def _status(client: JobSubmissionClient, name: str) -> JobStatus | None:
    try:
        with understood(name):
            return JobStatus(client.get_job_status(name))
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise


def _driver(client: JobSubmissionClient, name: str) -> str | None:
    """What the driver of a job asked for; None where that does not matter any more."""
    with understood(name):
        details = client.get_job_info(name)
        return None if details.status.is_terminal() else (details.metadata or {}).get(DRIVER, "")


def submit(submission: Submission, address: str) -> int:
    """Start (or find) the job, follow it, return its exit code; what happened is said on stderr."""
    client = connect(address)
    try:
        return _submit(client, submission, address)
    except AuthenticationError as error:
        raise token_error(address, error) from None
    except (RuntimeError, *CONNECTION_ERRORS) as error:
        raise JobError(
            f"{address}: the cluster does not answer as it should "
            f"({one_line(error, 200) or type(error).__name__}); "
            "submit the same thing again to follow it"
        ) from None


def _submit(client: JobSubmissionClient, submission: Submission, address: str) -> int:
    name, started = start(client, submission)
    status = None if started else _status(client, name)
    done = f"already {status.value.lower()}, following" if status else "submitted"
    print(f"{name}: {done} at {address}", file=sys.stderr, flush=True)
    if not started and (had := _driver(client, name)) not in (None, str(submission.driver)):
        print(
            f"{name}: its driver asked for {plain(str(had or 'nothing'))}; to ask for "
            f"{submission.driver or 'nothing'}, stop it and submit again "
            "(one that waits in vain is given up by Ray after 15 minutes)",
            file=sys.stderr,
        )
    code = follow(client, name)
    if code == INTERRUPTED:
        print(
            f"{name}: detached, the job goes on; submit the same thing again to follow it",
            file=sys.stderr,
        )
    else:
        with understood(name):
            details = client.get_job_info(name)
            # Without an exit code it never ran, or did not end by itself: only Ray knows why.
            why = (
                f" ({plain(details.message)})"
                if details.driver_exit_code is None and details.message
                else ""
            )
            print(f"{name}: {details.status.value.lower()}{why}", file=sys.stderr)
    return code
