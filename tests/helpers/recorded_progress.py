"""A `lidit.progress.Progress` for tests: keeps what it is told, and may act on it."""

from __future__ import annotations

from collections.abc import Callable


class RecordedProgress:
    """calls: (done, total) of `expect` and of every `update`; then: called with `done` of every
    update.
    """

    def __init__(self, then: Callable[[int], None] | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.notes: list[str] = []
        self.total = 0
        self._then = then

    def expect(self, total: int, done: int = 0) -> None:
        self.total = total
        self.calls.append((done, total))

    def update(self, done: int, note: str = "") -> None:
        self.calls.append((done, self.total))
        self.notes.append(note)
        if self._then:
            self._then(done)
