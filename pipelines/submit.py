"""Send a job to a Ray cluster once, follow it to its end, return its exit code.

The submission id is a function of the command, the bytes of the files it names and the code's version, and Ray refuses
a used id: submitting the same thing twice follows the first one. A failed or stopped attempt is followed by `ID-2`,
`ID-3`, ... Token authentication is on unless RAY_AUTH_MODE says otherwise.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from lidit.errors import InputError, JobError
from lidit.settings import has_password, load_yaml

JOB_NAME = re.compile(r"[a-z][a-z0-9_]*")
CODE_FOLDERS = ("lidit", "pipelines", "jobs")
ADDRESS_OVERRIDE = "RAY_API_SERVER_ADDRESS"
LOST_CONTACT_SECONDS = 600.0
RETRY_SECONDS = 2.0
INTERRUPTED = 130
# What a cluster that is away, restarting or behind a dropped tunnel looks like from here.
CONNECTION_ERRORS = (aiohttp.ClientError, requests.exceptions.RequestException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Submission:
    """What is asked for: `python -m jobs.JOB ARGUMENTS...` over the code and files in `working_dir`.

    Arguments that are files (recipes, encoder files) must lie in `working_dir`, which is what the cluster gets.
    Raises InputError for files elsewhere, and for a password where anyone could read it.
    """

    job: str
    arguments: tuple[str, ...]
    working_dir: Path = Path()
    corpus_digest: str | None = None

    def __post_init__(self) -> None:
        if not JOB_NAME.fullmatch(self.job):
            raise InputError(f"{self.job!r} is not the name of a job, such as embed or train")
        for argument in self.arguments:
            path = Path(argument)
            if argument.endswith((".yaml", ".yml")) and not path.is_file():
                raise InputError(f"{argument}: no such file")
            if path.is_file() and not path.resolve().is_relative_to(self.working_dir.resolve()):
                raise InputError(
                    f"{argument}: the file must lie inside {self.working_dir.resolve()}, which is what the cluster "
                    "gets; copy it there or start from its folder"
                )
            if has_password(argument):
                raise _password_error(argument.partition("=")[0] if "=" in argument else "the arguments")
        for path in self.files:
            if path.suffix in (".yaml", ".yml") and has_password(path.read_text("utf-8", "replace")):
                raise _password_error(str(path))

    @property
    def files(self) -> list[Path]:
        """Every file the arguments name, and the encoder files that a recipe among them names beside itself."""
        found = [Path(argument) for argument in self.arguments if Path(argument).is_file()]
        for path in [path for path in found if path.suffix in (".yaml", ".yml")]:
            encoders = load_yaml(path).get("encoders") or []
            found += [
                path.parent / entry for entry in encoders if isinstance(entry, str) and (path.parent / entry).is_file()
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
        """The same for the same command, bytes of the files it names and code version; readable in a list of jobs."""
        parts = [self.entrypoint.encode(), code_version(self.working_dir).encode()]
        parts += [path.read_bytes() for path in self.files]
        digest = hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).hexdigest()
        return f"lidit-{self.job}-{digest[:16]}"

    @property
    def metadata(self) -> dict[str, str]:
        """What the dashboard shows beside the job: never a secret."""
        facts = {"lidit.job": self.job, "git.commit": code_version(self.working_dir)}
        for path in self.files:
            facts[f"lidit.sha256.{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        return facts | ({"lidit.corpus_digest": self.corpus_digest} if self.corpus_digest else {})


def _password_error(where: str) -> InputError:
    return InputError(
        f"{where}: a URL with a password in it would be readable in the dashboard; "
        "give the password to the cluster's environment instead"
    )


def code_version(folder: Path) -> str:
    """The git commit; with uncommitted changes (or without git) a digest of code and shipped recipes is added."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        if not _git(folder, "status", "--porcelain", "--", *CODE_FOLDERS):
            return commit
    except (OSError, subprocess.CalledProcessError):
        commit = "no-git"
    digest = hashlib.sha256()
    for path in sorted(p for name in CODE_FOLDERS for p in (folder / name).rglob("*") if p.suffix in (".py", ".yaml")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return f"{commit}-{digest.hexdigest()[:12]}"


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def connect(address: str) -> JobSubmissionClient:
    """A client for the cluster's dashboard at http(s)://HOST:PORT. InputError: no answer, no token, a wrong token."""
    if not re.match(r"https?://[^/\s]+", address):
        raise InputError(f"{address!r}: the address is the dashboard's URL, such as http://127.0.0.1:8265")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path and not os.environ.get("RAY_AUTH_TOKEN") and not _has_text(Path(path)):
        raise InputError(f"RAY_AUTH_TOKEN_PATH={path}: no token can be read from this file")
    before = os.environ.get(ADDRESS_OVERRIDE)
    # RAY_ADDRESS in the environment would win over the address asked for; this variable wins over both.
    os.environ[ADDRESS_OVERRIDE] = address
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise _token_error(address, error) from None
    except CONNECTION_ERRORS as error:
        raise InputError(
            f"{address}: no Ray dashboard answers ({type(error).__name__}); "
            "check the address, or the tunnel or port-forward to it"
        ) from None
    finally:
        if before is None:
            del os.environ[ADDRESS_OVERRIDE]
        else:
            os.environ[ADDRESS_OVERRIDE] = before


def _has_text(path: Path) -> bool:
    try:
        return bool(path.read_text().strip())
    except OSError:
        return False


def _token_error(address: str, error: Exception) -> InputError:
    if "Forbidden" in str(error):
        return InputError(
            f"{address}: the cluster refuses this token; "
            "check RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token (the first that is set is used)"
        )
    return InputError(
        f"{address}: the cluster wants a token and there is none; "
        "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or put it into ~/.ray/auth_token"
    )


def start(client: JobSubmissionClient, submission: Submission) -> tuple[str, bool]:
    """(submission id, True when this call started it). A pending, running or succeeded one is not started again."""
    base = submission.submission_id
    attempt = 1
    while True:
        name = base if attempt == 1 else f"{base}-{attempt}"
        status = _status(client, name)
        if status in (JobStatus.FAILED, JobStatus.STOPPED):
            attempt += 1
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
            )
            return name, True
        except (RuntimeError, ValueError) as error:
            if _status(client, name) is None:
                raise JobError(f"{name}: the cluster refused the job: {' '.join(str(error).split())[:400]}") from None
            return name, False  # somebody submitted the same thing in between


def _status(client: JobSubmissionClient, name: str) -> JobStatus | None:
    try:
        return JobStatus(client.get_job_status(name))
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise


def follow(
    client: JobSubmissionClient,
    name: str,
    write: Callable[[str], object] = sys.stdout.write,
    on_interrupt: Callable[[], bool] | None = None,
) -> int:
    """Print the job's log until it ends; the job's own exit code, or 1 when it has none.

    `on_interrupt` is asked at Ctrl-C: True stops the job, False leaves it running and returns 130. A broken
    connection is taken up again where the log was left; JobError after ten minutes without contact.
    """
    written = 0
    contact = time.monotonic()

    async def tail() -> None:
        nonlocal written, contact
        skip = written  # the server tells the log from its beginning at every connection
        async for text in client.tail_job_logs(name):
            contact = time.monotonic()
            fresh = text[skip:]
            skip = max(0, skip - len(text))
            if fresh:
                write(fresh)
                written += len(fresh)

    pause = 0.0
    while True:
        try:
            time.sleep(pause)  # before a reconnection only: a cluster that is restarting is not to be hammered
            pause = RETRY_SECONDS
            if client.get_job_status(name).is_terminal():
                rest = client.get_job_logs(name)[written:]
                write(rest)
                written += len(rest)
                return _exit_code(client, name)
            contact = time.monotonic()
            asyncio.run(tail())
            pause = 0.0
        except KeyboardInterrupt:
            if not (on_interrupt or ask_on_terminal)():
                return INTERRUPTED
            client.stop_job(name)
        except AuthenticationError as error:
            raise _token_error(client.get_address(), error) from None
        except (*CONNECTION_ERRORS, RuntimeError) as error:
            if "status code 404" in str(error):
                raise JobError(f"{name}: the cluster does not know this job any more (was it restarted?)") from None
            if time.monotonic() - contact > LOST_CONTACT_SECONDS:
                raise JobError(
                    f"{name}: no contact with the cluster for {LOST_CONTACT_SECONDS:.0f} s ({error}); "
                    "the job may still run: submit the same thing again to follow it"
                ) from None


def _exit_code(client: JobSubmissionClient, name: str) -> int:
    details = client.get_job_info(name)
    if details.status == JobStatus.SUCCEEDED:
        return 0
    return details.driver_exit_code or 1


def ask_on_terminal() -> bool:
    """Whether Ctrl-C stops the job. Without a terminal to ask on, the job is left running."""
    if not sys.stdin.isatty():
        return False
    try:
        return input("\nStop the job (s), or leave it running and detach (d)? [d] ").strip().lower().startswith("s")
    except (EOFError, KeyboardInterrupt):
        return False


def submit(submission: Submission, address: str) -> int:
    """Start (or find) the job, follow it, return its exit code; what happened is said on stderr."""
    client = connect(address)
    name, started = start(client, submission)
    done = "submitted" if started else f"already {JobStatus(client.get_job_status(name)).value.lower()}, following"
    print(f"{name}: {done} at {address}", file=sys.stderr, flush=True)
    code = follow(client, name)
    if code == INTERRUPTED:
        print(f"{name}: detached, the job goes on; submit the same thing again to follow it", file=sys.stderr)
    else:
        status = JobStatus(client.get_job_status(name)).value.lower()
        print(f"{name}: {status}", file=sys.stderr)
    return code
