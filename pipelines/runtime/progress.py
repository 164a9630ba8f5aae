"""What a person sees while long work runs: a bar with a rate and an ETA; plain lines where there is
no terminal.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

PLAIN_LINE_SECONDS = 10.0
QUIET = "LIDIT_QUIET"  # set for the option --quiet
RECENT_UPDATES = 20


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """The part of the terminal that bars are drawn in. Bars of several threads share one: hand it
    to each of them.
    """

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def bars(self) -> Progress | None:
        """Where bars are added, shown from the first call on; None without a terminal, where every
        bar prints lines.
        """
        with self._lock:
            console = Console(stderr=True)
            if self._bars is None and console.is_terminal and not os.environ.get(QUIET):
                self._bars = Progress(
                    SpinnerColumn(),
                    TextColumn("[bold]{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[rate]}"),
                    TimeElapsedColumn(),
                    TextColumn("{task.fields[note]}"),
                    console=console,
                )
                self._bars.start()
            return self._bars


class ProgressBar:
    """`with ProgressBar("embed smollm2", total=1944, unit="captions") as bar: bar.update(done,
    note)`.

    A `lidit.progress.Progress`. `total` is None where only the work knows it: nothing is shown
    until `expect` says it. Steps that an earlier run finished are given as `start`, so that the
    rate and the ETA speak only of this process.
    display: where other bars are shown at the same time; by default the bar has one for itself.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str,
        start: int = 0,
        display: Display | None = None,
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.start = self.done = start
        self.note = ""
        self._printed: tuple[int, str] | None = None  # (done, note) of the last plain line
        self._began = self._last_line = time.monotonic()
        # The rate is that of the last updates: the first step of a job says little about the next
        # thousand.
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_UPDATES)
        self._shared = display
        self._opened = ExitStack()
        self._bars: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        if self.total is not None:
            self.expect(self.total, self.start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._opened:
            if self._bars is not None and self._task is not None:
                self._bars.stop_task(self._task)
                return
            # An error before the first step says all there is to say.
            failed_at_once = error is not None and self.done == self.start
            if self._recent and not failed_at_once and self._printed != (self.done, self.note):
                self._print()

    def expect(self, total: int, done: int = 0) -> None:
        """There are `total` steps, `done` of them by an earlier run; again where more steps turn
        up.
        """
        self.total = total
        if not self._recent:
            self._begin(done)
        elif self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=total)

    def update(self, done: int, note: str = "") -> None:
        """`done` steps are finished in all; `note` says what else matters now (loss, refused rows,
        ...).
        """
        self.done, self.note = done, note or self.note
        self._recent.append((time.monotonic(), done))
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, rate=self._rate(), note=self.note)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._print()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more steps are finished."""
        self.update(self.done + count, note)

    def _begin(self, done: int) -> None:
        self.start = self.done = done
        self._began = self._last_line = time.monotonic()
        self._recent.append((self._began, done))
        display = self._shared or self._opened.enter_context(Display())
        self._bars = display.bars()
        if self._bars is not None:
            self._task = self._bars.add_task(
                self.title, total=self.total, completed=done, rate="", note=""
            )

    def _rate(self) -> str:
        (since, before), (now, done) = self._recent[0], self._recent[-1]
        if done <= before or now <= since:
            return "starting"
        rate = (done - before) / (now - since)
        shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.2g}" if rate < 1 else f"{rate:.1f}"
        if self.total is None or self.done >= self.total:
            return f"{shown} {self.unit}/s"
        return f"{shown} {self.unit}/s, {duration((self.total - self.done) / rate)} left"

    def _print(self) -> None:
        self._last_line, self._printed = time.monotonic(), (self.done, self.note)
        if os.environ.get(QUIET):
            return
        elapsed = duration(self._last_line - self._began)
        parts = [
            f"{self.done}/{self.total} {self.unit}",
            self._rate(),
            f"{elapsed} gone",
            self.note,
        ]
        print(
            f"{self.title}: " + ", ".join(part for part in parts if part),
            file=sys.stderr,
            flush=True,
        )
