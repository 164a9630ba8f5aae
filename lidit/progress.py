"""How long work says how far it is: the same two calls everywhere, whoever shows them."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What long work is handed. `pipelines.runtime.progress.ProgressBar` shows it; a notebook may
    bring its own.
    """

    def expect(self, total: int, done: int = 0) -> None:
        """There are `total` steps, `done` of them by an earlier run. Called before the first step
        is reported, and again with a larger total where more steps turn up. Work that has nothing
        to do calls neither method.
        """

    def update(self, done: int, note: str = "") -> None:
        """`done` steps are finished in all; `note` says what else matters now (loss, refused rows,
        ...).
        """


class Silent:
    """Shows nothing."""

    def expect(self, total: int, done: int = 0) -> None:
        """Nothing to prepare."""

    def update(self, done: int, note: str = "") -> None:
        """Nothing to show."""


SILENT: Progress = Silent()
