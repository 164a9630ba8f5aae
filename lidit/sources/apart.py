"""A call in a process of its own, for sources whose bytes may end the process that reads them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from lidit.errors import InputError, JobError

# What bytes do to a decoder; any other signal, such as the kernel's SIGKILL for want of memory,
# says nothing of them.
_OF_THE_BYTES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_ERRORS = {"InputError": InputError, "JobError": JobError}


class ReaderDiedError(Exception):
    """The process that read a source died of its bytes; the message names the signal."""


def call_apart(module: str, arguments: dict[str, Any], subject: str) -> None:
    """Run `main()` of a module, which is to `serve` the arguments, and wait for its end.

    Raises what it raised; ReaderDiedError where the bytes that it read ended it; JobError where
    anything else did.
    """
    code = f"import {module} as module; module.main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(arguments).encode() + b"\n")
        # and left open: its end tells the other process that this one has died
        process.stdin.flush()
        answer = process.stdout.read()
        status = process.wait()
    if status == 0:
        error = json.loads(answer)
        if error is not None:
            raise _ERRORS[error["kind"]](error["message"])
    elif -status in _OF_THE_BYTES:
        raise ReaderDiedError(signal.Signals(-status).name)
    else:
        ended = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        raise JobError(
            f"{subject}: the process reading it ended ({ended}); run the same command again"
        )


def serve(function: Callable[[dict[str, Any]], None]) -> None:
    """The other side of `call_apart`."""
    arguments = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    error = None
    try:
        function(arguments)
    except (InputError, JobError) as raised:
        error = {"kind": type(raised).__name__, "message": str(raised)}
    print(json.dumps(error))


def _end_with_parent() -> None:
    # nothing more is sent; below Python's buffer, whose lock would outlive this thread
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
