"""An embedded Ray: started up to three times, told where it will be slow, watched until it ends."""

from __future__ import annotations

import logging
import os
from typing import Any

from lidit.errors import JobError, one_line
from pipelines.runtime.places import RayFolder, own_token, ray_folder
from pipelines.runtime.processes import Process, end, ray_children
from pipelines.runtime.watch import watch_processes

TRIES = 3
PATIENCE = "RAY_gcs_server_port_wait_time_s"  # how long Ray waits for its own first process
FIRST_PATIENCE = 30  # seconds, Ray's own; doubled with every try
HEAD = ("gcs_server", "raylet")  # the processes without which the cluster cannot go on
GIGABYTE = 1e9

log = logging.getLogger(__name__)


def start(cpus: int, temp_dir: str | None, settings: dict[str, Any]) -> None:
    """Start a Ray of `cpus` logical CPUs in this process. settings: of `ray.init`, besides.

    Raises InputError where no folder serves Ray, JobError where it does not start in three tries.
    """
    place = RayFolder(temp_dir) if temp_dir else ray_folder()
    own_token()
    if place.spill:
        settings = settings | {"object_spilling_directory": place.spill}
    for attempt in range(1, TRIES + 1):
        # an earlier Ray's may still be on their way out
        before = {child.pid for child in ray_children()}
        patience = (
            {} if PATIENCE in os.environ else {PATIENCE: str(FIRST_PATIENCE * 2 ** (attempt - 1))}
        )
        os.environ.update(patience)
        try:
            _start(cpus, place.folder, settings)
            break
        except BaseException as error:
            _clear(before)
            if isinstance(error, ValueError):  # of settings in the environment
                raise JobError(f"Ray cannot start: {one_line(error, 300)}") from None
            if not _may_pass(error):
                raise
            if attempt == TRIES:
                raise JobError(
                    f"Ray did not start in {TRIES} tries ({one_line(error, 200)}); the machine "
                    "may be too busy "
                    "or short of memory: run the same command again when it has less to do, or set "
                    "RAY_ADDRESS to a cluster"
                ) from None
            log.warning(
                "Ray did not start (%s): try %d of %d", one_line(error, 200), attempt + 1, TRIES
            )
        finally:
            for name in patience:
                os.environ.pop(name, None)
    head = [child for child in ray_children() if child.name in HEAD and child.pid not in before]
    _tell_slow_store(head)
    watch_processes({child.pid: child.name for child in head})


def _start(cpus: int, folder: str | None, settings: dict[str, Any]) -> None:
    import ray

    # "local": without it Ray would join whatever cluster was last started on this machine.
    ray.init(address="local", num_cpus=cpus, _temp_dir=folder, **settings)


def _may_pass(error: BaseException) -> bool:
    """Whether the next try may succeed: no wish to end, no mistake of ours or the user's."""
    return isinstance(error, Exception) and not isinstance(error, OSError | TypeError)


def _clear(before: set[int]) -> None:
    """End what a failed start leaves running; Ray itself forgets it."""
    import ray

    ray.shutdown()
    end([child for child in ray_children() if child.pid not in before])


def _tell_slow_store(head: list[Process]) -> None:
    """Say that objects live in files because /dev/shm is too small: Ray decides so and only logs
    it.
    """
    for raylet in head:
        store, wanted = raylet.option("plasma_directory"), raylet.option("object_store_memory")
        if not store or not wanted or store == "/dev/shm":
            continue
        has, size = os.statvfs("/dev/shm"), int(wanted)
        log.warning(
            "/dev/shm has %.1f GB free, Ray's object store wants %.1f GB: it is kept in %s, "
            "which is slower; start the "
            "container with more (docker run --shm-size=%.0fg; on Kubernetes an emptyDir with "
            "medium: Memory)",
            has.f_bavail * has.f_frsize / GIGABYTE,
            size / GIGABYTE,
            store,
            1.1 * size / 2**30 + 1,
        )
