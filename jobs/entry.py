"""The program `lidit`: a Ctrl-C while its modules are still being read ends it as quietly as a
later one.
"""

from __future__ import annotations

import gc
import os
import signal
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """Run the command line's words as a job."""
    # A shell's background job ignores the signal, and goes on ignoring it.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _end)
    # What modules make while they are read stays: no garbage is looked for in it.
    gc.disable()
    from jobs.main import main as start

    gc.freeze()
    gc.enable()
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    start()


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted: nothing was begun\n")
    os._exit(INTERRUPTED)
