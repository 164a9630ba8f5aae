"""Ray's own processes, watched while this process uses them: what a job says when they are gone.

Ray ends a process that has lost its cluster without a word, at once or after a minute.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping

RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # how long Ray waits for a head that is gone
RAYS_PATIENCE = 60.0  # seconds, its default
LOOK_EVERY = 2.0  # seconds
TOLD_AFTER = 8.0  # seconds without an answer
SPARE = 10.0  # seconds before Ray's own patience ends: its end comes without a word

log = logging.getLogger(__name__)


def _only_say(reason: str) -> None:
    log.error("%s; call ray.shutdown() and start again", reason)


_when_lost: Callable[[str], None] = _only_say


def when_lost(act: Callable[[str], None]) -> None:
    """What to do when the cluster is lost: `act` gets the reason, in a thread of its own."""
    global _when_lost
    _when_lost = act


def watch_processes(names: Mapping[int, str]) -> None:
    """Call what `when_lost` was given as soon as one of the processes ends. names: by process
    number.
    """
    if not hasattr(os, "pidfd_open"):  # Linux has it
        return
    address = _address()
    watched: dict[int, str] = {}
    try:
        for pid, name in names.items():
            watched[os.pidfd_open(pid)] = name
    except OSError:  # an old kernel, or a process that is gone: then Ray itself says so
        pass
    ends = select.poll()
    for descriptor in watched:
        ends.register(descriptor, select.POLLIN)

    def wait() -> None:
        dead = " and ".join(watched[descriptor] for descriptor, _ in ends.poll())
        for descriptor in watched:
            os.close(descriptor)
        if _connected(address):
            _when_lost(f"Ray's own process {dead} died (killed, or out of memory)")

    if watched:
        threading.Thread(target=wait, name="ray-watch", daemon=True).start()


def watch_head() -> None:
    """Say that the head of a joined cluster does not answer, and give up shortly before Ray would
    end this process.

    A head that keeps its tables elsewhere may come back in time; the job then goes on.
    """
    address = _address()
    host, _, port = address.rpartition(":")
    rays = float(os.environ.get(RECONNECT) or RAYS_PATIENCE)
    patience = max(rays - SPARE, rays / 2)

    def wait() -> None:
        answered, told = time.monotonic(), False
        while _connected(address):
            now = time.monotonic()
            if _listens(host.strip("[]"), int(port)):
                if told:
                    log.warning("Ray's head at %s answers again", address)
                answered, told = now, False
            elif now - answered >= patience:
                _when_lost(f"Ray's head at {address} has not answered for {now - answered:.0f} s")
                return
            elif now - answered >= TOLD_AFTER and not told:
                told = True
                left = patience - (now - answered)
                log.warning(
                    "Ray's head at %s does not answer; %.0f s are left for it to come back",
                    address,
                    left,
                )
            time.sleep(LOOK_EVERY)  # a thread of its own: the job never waits for it

    threading.Thread(target=wait, name="ray-head-watch", daemon=True).start()


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=LOOK_EVERY).close()
    except OSError:
        return False
    return True


def _address() -> str:
    """Host and port of the cluster's head that this process is connected to."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _connected(address: str) -> bool:
    """Whether this process still uses the cluster: at its own ending Ray disconnects before it ends
    its processes.
    """
    import ray

    try:
        return ray.is_initialized() and _address() == address
    except Exception:  # an attribute of a connection that is being closed by the main thread
        return False
