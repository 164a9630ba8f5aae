"""The death of a training worker at a chosen step."""

import contextlib
import os
import signal
import threading
from pathlib import Path

import psutil

from pipelines.training import checkpoints
from tests.helpers.waiting import wait_until


def kill_a_worker_after(run: Path, step: int, killed: list[int]) -> threading.Thread:
    """SIGKILL one training worker once the checkpoint of `step` is there; its pid goes into
    `killed`.
    """

    def workers() -> list[int]:
        found = []
        for process in psutil.Process().children(recursive=True):  # never another training's worker
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process.pid)
        return found

    def hunt() -> None:
        wait_until((run / checkpoints.checkpoint_name(step) / "position.json").exists, seconds=900)
        victim = wait_until(workers, seconds=20)[0]
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)

    thread = threading.Thread(target=hunt)
    thread.start()
    return thread
