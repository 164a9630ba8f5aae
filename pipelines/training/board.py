"""The board: one small actor through which driver and workers hear of each other."""

from __future__ import annotations

from typing import Any

from lidit.errors import InputError, JobError


class Board:
    """Progress of rank 0, the first failure, the request to stop, the tracker's credentials.

    It lives on the driver's node as long as the driver does, and so outlives every restart of the
    workers.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.kept: dict[str, str] = {}
        self.stopping = False
        self.failed: InputError | JobError | None = None

    # -- failures: an error that a restart of the workers would only meet again -------------------

    def fail(self, error: InputError | JobError) -> None:
        """Record a worker's error. The first one counts: later ones are often its consequences."""
        self.failed = self.failed or error

    def failure(self) -> InputError | JobError | None:
        return self.failed

    # -- stopping early ---------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the workers to save and leave; rank 0 looks after every step."""
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping

    # -- credentials of the tracker, from the driver to the workers -------------------------------

    def keep(self, credentials: dict[str, str]) -> None:
        """Keep what a worker needs to log.

        A call's arguments are in no log, no dashboard and no state export, unlike a worker's
        environment.
        """
        self.kept = credentials

    def credentials(self) -> dict[str, str]:
        return self.kept

    # -- progress ---------------------------------------------------------------------------------

    def post(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def take(self) -> list[dict[str, Any]]:
        """The messages since the last call."""
        taken, self.messages = self.messages, []
        return taken
