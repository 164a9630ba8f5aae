"""A part in a process of its own: a hang or a crash there ends that part, and nothing else.

On a GPU every part is a fresh process: the CUDA profiler does not outlive a fork. It is started one
part ahead and waits with everything imported, so that its imports cost no time. A dry run forks
instead and imports once.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch

from benchmarks.gpu.parts import Part
from benchmarks.gpu.run import Run


def load(part: Part) -> Callable[[Run], None]:
    """The function that measures `part`, with all that it imports."""
    function: Callable[[Run], None] = getattr(
        importlib.import_module(f"benchmarks.gpu.{part.module}"), f"part_{part.number}"
    )
    return function


class PartProcess:
    """`part` in a process that imports at once and measures when it is told to."""

    def __init__(
        self, part: Part, device: str, toy: bool, method: Literal["fork", "spawn"]
    ) -> None:
        self.part = part
        context = multiprocessing.get_context(method)
        self.results, theirs = context.Pipe(duplex=True)
        self.process = context.Process(target=_child, args=(part, device, toy, theirs))
        self.process.start()
        theirs.close()

    def run(self, ends: float, partial: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Measures for as long as the part may, and not beyond `ends` on `time.monotonic`'s clock;
        imports do not count. `partial` gets every figure as it comes, the result holds all of them.
        """
        began = time.monotonic()
        found: dict[str, Any] = {
            "part": self.part.number,
            "title": self.part.title,
            "status": "done",
        }
        figures: list[dict[str, Any]] = []
        limit = ends
        while True:
            if not wait([self.results], max(0.0, limit - time.monotonic())):
                found["status"] = f"ended after {limit - began:.0f} s"
                break
            try:
                message = json.loads(self.results.recv_bytes())
            except (EOFError, OSError):
                self.process.join(2)
                found["status"] = f"crashed, exit code {self.process.exitcode}"
                break
            if "ready" in message:
                began = time.monotonic()
                limit = min(ends, began + self.part.seconds)
                self.results.send_bytes(json.dumps(limit - began).encode())
            elif "status" in message:
                found.update(message)
                break
            else:
                figures.append(message)
                partial(message)
        return {**found, "seconds": round(time.monotonic() - began, 1), "figures": figures}

    def stop(self) -> None:
        """Ends the process and whatever it has started: compilers have workers."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(5)


def _child(part: Part, device: str, toy: bool, results: Connection) -> None:
    os.setsid()  # a group of its own, so that it is ended with its children
    os.dup2(2, 1)  # standard output is for figures alone
    try:
        measure = load(part)
        _send(results, {"ready": True})
        seconds = json.loads(results.recv_bytes())
        # A margin: what a part reports before it is ended is better than what it would have found.
        run = Run(
            torch.device(device),
            toy,
            time.monotonic() + seconds - 1,
            lambda found: _send(results, found),
        )
        if run.cuda:
            torch.set_float32_matmul_precision("high")
        else:
            torch.set_num_threads(1)
        measure(run)
        _send(results, {"status": "done"})
    except EOFError:
        return  # nobody waits for this part any more
    except Exception as error:
        traceback.print_exc()
        _send(
            results,
            {"status": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"},
        )


def _send(results: Connection, found: dict[str, Any]) -> None:
    results.send_bytes(json.dumps(found).encode())
