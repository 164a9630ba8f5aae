"""A submitted job's log, printed until it ends, across broken connections and Ctrl-C."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from lidit.errors import JobError, plain
from pipelines.submission.dashboard import CONNECTION_ERRORS, token_error, understood

LOST_CONTACT_SECONDS = 600.0
RETRY_SECONDS = 2.0
INTERRUPTED = 130


def follow(
    client: JobSubmissionClient,
    name: str,
    write: Callable[[str], object] | None = None,
    on_interrupt: Callable[[], bool] | None = None,
) -> int:
    """Print the job's log until it ends; the job's own exit code, or 1 when it has none.

    `on_interrupt` is asked at Ctrl-C: True stops the job, False leaves it running and returns 130.
    A broken connection is taken up again where the log was left; JobError after ten minutes without
    contact.
    """
    written = 0
    contact = time.monotonic()
    write = write or sys.stdout.write

    async def tail() -> None:
        nonlocal written, contact
        skip = written  # the server tells the log from its beginning at every connection
        async for text in client.tail_job_logs(name):
            contact = time.monotonic()
            fresh = text[skip:]
            skip = max(0, skip - len(text))
            if fresh:
                write(plain(fresh))
                written += len(fresh)

    pause = 0.0
    while True:
        try:
            # Within the try, because Ctrl-C is answered while waiting, too.
            time.sleep(pause)  # zero but after a broken connection: a cluster restarts in peace
            pause = RETRY_SECONDS
            with understood(name):
                if client.get_job_status(name).is_terminal():
                    rest = client.get_job_logs(name)[written:]
                    write(plain(rest))
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
            raise token_error(client.get_address(), error) from None
        except (*CONNECTION_ERRORS, RuntimeError) as error:
            if "status code 404" in str(error):
                raise JobError(
                    f"{name}: the cluster does not know this job any more (was it restarted?)"
                ) from None
            if time.monotonic() - contact > LOST_CONTACT_SECONDS:
                raise JobError(
                    f"{name}: no contact with the cluster for {LOST_CONTACT_SECONDS:.0f} s "
                    f"({error}); "
                    "the job may still run: submit the same thing again to follow it"
                ) from None


def _exit_code(client: JobSubmissionClient, name: str) -> int:
    details = client.get_job_info(name)
    if details.status == JobStatus.SUCCEEDED:
        return 0
    code = details.driver_exit_code
    return code if code in range(1, 256) else 1  # the shell would read 256 as success


def ask_on_terminal() -> bool:
    """Whether Ctrl-C stops the job. Without a terminal to ask on, the job is left running."""
    if not sys.stdin.isatty():
        return False
    try:
        return (
            input("\nStop the job (s), or leave it running and detach (d)? [d] ")
            .strip()
            .lower()
            .startswith("s")
        )
    except (EOFError, KeyboardInterrupt):
        return False
