"""What a person sees while long work runs: a bar with a rate and an ETA; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

PLAIN_LINE_SECONDS = 10.0
RECENT_UPDATES = 20


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """`with Progress("embed smollm2", total=1944, unit="captions") as progress: progress.update(done, note)`.

    `done` counts from 0 to `total`. Work found finished at the start (a resumed job) is given as `start`, so that the
    rate and the ETA speak only of what this process did. Several at once, from several threads, share one display.
    """

    _display: Bar | None = None
    _shown = 0
    _lock = threading.Lock()

    def __init__(self, title: str, total: int, unit: str, start: int = 0) -> None:
        self.title, self.total, self.unit, self.start = title, total, unit, start
        self.done, self.note = start, ""
        self.told: tuple[int, str] | None = None  # by the last plain line
        self.began = self.last_line = time.monotonic()
        # The rate is that of the last updates: the first step of a job says little about the next thousand.
        self.recent: deque[tuple[float, int]] = deque([(self.began, start)], maxlen=RECENT_UPDATES)
        self.bar: Bar | None = None
        self.task = TaskID(0)

    def __enter__(self) -> Progress:
        console = Console(stderr=True)
        if console.is_terminal:
            with Progress._lock:
                Progress._shown += 1
                if Progress._display is None:
                    Progress._display = Bar(
                        SpinnerColumn(),
                        TextColumn("[bold]{task.description}"),
                        BarColumn(),
                        MofNCompleteColumn(),
                        TextColumn("{task.fields[rate]}"),
                        TimeElapsedColumn(),
                        TextColumn("{task.fields[note]}"),
                        console=console,
                    )
                    Progress._display.start()
                self.bar = Progress._display
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.start, rate="", note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.bar:
            nothing = error is not None and self.done == self.start  # says nothing; the error will
            if not nothing and self.told != (self.done, self.note):
                self._line()
            return
        self.bar.stop_task(self.task)
        with Progress._lock:
            Progress._shown -= 1
            if not Progress._shown:
                self.bar.stop()
                Progress._display = None

    def update(self, done: int, note: str = "") -> None:
        """`done` units are finished in all; `note` says what else matters now (loss, quarantined rows, ...)."""
        self.done, self.note = done, note or self.note
        self.recent.append((time.monotonic(), done))
        if self.bar:
            self.bar.update(self.task, completed=done, rate=self._rate(), note=self.note)
        elif time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS:
            self._line()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.update(self.done + count, note)

    def _rate(self) -> str:
        (since, before), (now, done) = self.recent[0], self.recent[-1]
        if done <= before or now <= since:
            return "starting"
        rate = (done - before) / (now - since)
        left = duration((self.total - self.done) / rate)
        shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.2g}" if rate < 1 else f"{rate:.1f}"
        return f"{shown} {self.unit}/s, {left} left" if self.done < self.total else f"{shown} {self.unit}/s"

    def _line(self) -> None:
        self.last_line, self.told = time.monotonic(), (self.done, self.note)
        elapsed = duration(self.last_line - self.began)
        parts = [f"{self.done}/{self.total} {self.unit}", self._rate(), f"{elapsed} gone", self.note]
        print(f"{self.title}: " + ", ".join(part for part in parts if part), file=sys.stderr, flush=True)
