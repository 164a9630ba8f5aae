"""Ends that cannot wait for the main thread: a second Ctrl-C, and a Ray that died under the job.

Everything is published whole or not at all, so a process may end at any moment.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

from pipelines.runtime.watch import when_lost

STDERR = 2
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
AGAIN = "interrupted again: ended at once, everything finished is kept"
SHOW_CURSOR = "\x1b[?25h\n"  # a progress bar has hidden it


def end_now(line: str, code: int) -> NoReturn:
    """End this process with one line. Ray's processes end with it."""
    begin = SHOW_CURSOR if os.isatty(STDERR) else ""
    # before anything that may wait: Ray may end this process, too
    os.write(STDERR, f"{begin}{line}\n".encode())
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def end_when_ray_dies() -> None:
    """Say what to do, once Ray's own processes are gone: Ray would end this process
    without a word.
    """
    kept = "everything finished is kept: run the same command again"
    when_lost(lambda reason: end_now(f"failed: {reason}; {kept}", EXIT_FAILED))


def end_at_second_interrupt() -> None:
    """Let the first Ctrl-C be Python's KeyboardInterrupt and the second end this process at once,
    wherever it is.
    """
    # a shell's background job ignores it
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    interrupts = 0

    # In Python code: no second KeyboardInterrupt, whose traceback would come out of the handling of
    # the first.
    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            end_now(AGAIN, EXIT_INTERRUPTED)
        raise KeyboardInterrupt

    # In C++ code no handler of Python's runs, but the bytes of a wake-up descriptor come all the
    # same.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def count() -> None:
        seen = 0
        while seen < 2:
            seen += os.read(reader, 64).count(signal.SIGINT)
        end_now(AGAIN, EXIT_INTERRUPTED)

    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # a child's bytes would count as this process's
    os.register_at_fork(after_in_child=interrupts_are_answers)
    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=count, name="interrupts", daemon=True).start()


def interrupts_are_answers() -> None:
    """For a job that asks what Ctrl-C shall do: no number of them ends it."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_interrupted() -> NoReturn:
    """End after a Ctrl-C with everything that is to be done at the end, but without the
    interpreter's own.

    That one takes seconds with Ray and torch loaded, in which another Ctrl-C would kill it or show
    a traceback.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(EXIT_INTERRUPTED)
