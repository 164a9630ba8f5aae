"""Leaving early with everything saved: after SIGTERM, or before a node is preempted."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any

import ray
import ray.train as rt
import torch.distributed as dist

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ASK_SECONDS = 1.0
PREEMPTION_SECONDS = 10.0


class Action(IntEnum):
    """GO_ON; LOOK: ask Ray about preemption; SAVE: save and go on, Ray restarts the run; STOP: save
    and leave.
    """

    GO_ON = 0
    LOOK = 1
    SAVE = 2
    STOP = 3


class Listener:
    """What all workers do after a step. Rank 0 asks the driver's board, without waiting."""

    def __init__(self, board: Any) -> None:
        self.board = board if dist.get_rank() == 0 else None
        self._answer: Any = None
        self._asked, self._looked = -ASK_SECONDS, time.monotonic()
        self._saved_for: Any = None

    def answer(self, action: Action) -> Action:
        """What to do after a step at which rank 0 had this wish; the same on every worker."""
        if action is not Action.LOOK:
            return action
        info = rt.get_preemption_info()
        if info is None or info == self._saved_for:
            return Action.GO_ON
        self._saved_for = info
        return Action.SAVE

    def wish(self) -> Action:
        """This worker's; on other ranks than 0 always GO_ON, so that the sum over all of them is
        rank 0's.
        """
        if self.board is None:
            return Action.GO_ON
        now = time.monotonic()
        if self._answer is None and now - self._asked >= ASK_SECONDS:
            self._answer, self._asked = self.board.is_stopping.remote(), now
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            stopping, self._answer = ray.get(self._answer), None
            if stopping:
                return Action.STOP
        if now - self._looked >= PREEMPTION_SECONDS:
            self._looked = now
            return Action.LOOK
        return Action.GO_ON


@contextmanager
def saved_on_sigterm(board: Any) -> Iterator[threading.Event]:
    """SIGTERM sets the event and makes the workers save and leave; a second one ends the process at
    once.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    woken = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        asked.set()
        woken.set()
        signal.signal(signal.SIGTERM, before)

    def forward() -> None:  # not in the handler: it may have interrupted Ray's own code
        woken.wait()
        if asked.is_set():
            board.stop.remote()

    thread = threading.Thread(target=forward, daemon=True)
    before = signal.signal(signal.SIGTERM, handle)
    thread.start()
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
        woken.set()
        thread.join()


def is_disk_full(error: BaseException) -> bool:
    """Whether disk or quota is used up, also inside an error that a library made of it."""
    return (isinstance(error, OSError) and error.errno in DISK_FULL) or any(
        text in str(error) for text in ("No space left on device", "StorageFull", "File too large")
    )
