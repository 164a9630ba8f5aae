"""A cluster that RAY_ADDRESS names: joined, or refused with what is wrong with the address; then
watched.
"""

from __future__ import annotations

import logging
import os
import socket
import time

from lidit.errors import InputError, one_line
from pipelines.runtime.processes import raylets
from pipelines.runtime.watch import watch_head, watch_processes

CLUSTER_ADDRESS = "RAY_ADDRESS"
TRIES = 5  # a head that has just been started may not listen yet
BETWEEN = 2.0  # seconds
LARGEST_PORT = 65535
REMEDY = "start the cluster, correct the address, or unset it for a Ray of this machine alone"


def join(address: str) -> None:
    """Connect this process to the cluster at `address`: "auto", or the head's host:port.

    Raises InputError where nobody answers there, or where Ray refuses. Without a look of our own,
    Ray would try an address at which nobody listens for four minutes.
    """
    import ray

    if "://" in address:
        raise InputError(
            f"{CLUSTER_ADDRESS}={address}: a job runs inside its cluster; give the head's "
            "host:port (6379), or "
            "send the job there with lidit submit"
        )
    if address != "auto":
        _require_listener(address)
    # Only here: an embedded Ray makes its own token, but refuses to start when the mode is set and
    # none exists.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        # "auto": Ray reads the variable itself
        ray.init(address="auto", logging_level=logging.ERROR)
    except (ValueError, RuntimeError, OSError) as error:
        ray.shutdown()
        raise InputError(
            f"{CLUSTER_ADDRESS}={address}: Ray cannot join ({one_line(error, 300)}); {REMEDY}"
        ) from None
    here = raylets(ray.get_runtime_context().get_node_id())
    watch_processes({raylet.pid: raylet.name for raylet in here})
    watch_head()


def _require_listener(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > LARGEST_PORT:
        raise InputError(f"{CLUSTER_ADDRESS}={address}: is no host:port; {REMEDY}")
    for attempt in range(TRIES):
        if attempt:
            time.sleep(BETWEEN)  # for a head that is still starting
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=BETWEEN).close()
            return
        except OSError as error:
            reason = one_line(error, 100)
    raise InputError(f"{CLUSTER_ADDRESS}={address}: nobody answers ({reason}); {REMEDY}")
