"""The platform's start: on this machine with a Ray of its own, or as a config for a cluster."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import TracingConfig

from lidit.errors import InputError, JobError, one_line
from lidit.pipeline import INDEX
from lidit.serving.keys import KeysUnavailable
from lidit.serving.shared_keys import open_keys
from pipelines.runtime.resources import CLUSTER_ADDRESS, connect, total
from pipelines.serving.application import IMPORT_PATH, NAME, application, places_of
from pipelines.serving.door import CALLBACK, PLACE
from pipelines.serving.ledger import KEYS
from pipelines.serving.remote import LONGEST_MESSAGE, MESSAGE_BYTES, PROXY_DIRECT
from pipelines.serving.settings import ServeSettings
from pipelines.serving.studio import check_guards, words_of
from pipelines.serving.traces import EXPORTER

FIRST_SCOPES = ("generate", "moderate", "verify")
NET_S = 60.0  # Serve's own deadline stands so far behind ours
# Serve ends a proxy that is not ready after five seconds and starts another: on a busy machine it
# would end them all.
PATIENCE, PATIENCE_S = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60"
# What Ray's processes find in their environment unless it says otherwise.
OFFERED = {PATIENCE: PATIENCE_S, MESSAGE_BYTES: str(LONGEST_MESSAGE), PROXY_DIRECT: "1"}
EXAMPLE = "a red circle left of a blue square"

log = logging.getLogger(__name__)


def guarded(settings: ServeSettings, given: Mapping[str, Any]) -> ServeSettings:
    """The settings as they are served with: on this machine alone, guards that nobody has named are
    not needed.

    given: what the user wrote. Raises InputError where guards are needed and missing, or the model
    is.
    """
    if not (Path(settings.model) / INDEX).is_file():
        raise InputError(
            f"{settings.model}: no {INDEX}, so this is not a model folder written by lidit train"
        )
    if "needed" not in (given.get("guards") or {}) and _only_here(settings.host):
        settings = settings.model_copy(
            update={"guards": settings.guards.model_copy(update={"needed": False})}
        )
    check_guards(settings)
    words_of(settings)  # a list that cannot be used is told now, not by a replica
    return settings


def serve_here(settings: ServeSettings) -> None:
    """Start a Ray of this process's own, serve until a signal, and end it."""
    # Every process of Serve inherits this: without it, clients could steer Serve by headers.
    os.environ[CALLBACK] = PLACE
    for name, value in OFFERED.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    key = first_key(settings)
    # Processes that wait for each other need a logical CPU each: with too few, they would wait for
    # ever.
    connect(
        cpus=max(1, math.ceil(sum(place.replicas * place.cpus for place in places_of(settings))))
    )
    check_places(settings)
    options = {
        "host": settings.host,
        "port": settings.port,
        "request_timeout_s": settings.limits.deadline_s + NET_S,
    }
    ready, ended = threading.Event(), threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if not ready.is_set():  # Serve waits for its replicas, for ever if need be
            raise KeyboardInterrupt
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        serve.start(
            proxy_location="HeadOnly", http_options=options, tracing_config=tracing(settings)
        )
        serve.run(application(settings), name=NAME, route_prefix="/")
        ready.set()
        _tell(settings, key)
        ended.wait()
    # of a deployment that failed, of a proxy that is late, of a process that was lost
    except (RuntimeError, TimeoutError, RayError) as error:
        raise JobError(f"the platform did not start: {one_line(error, 300)}") from None
    finally:
        serve.shutdown()


def tracing(settings: ServeSettings) -> TracingConfig:
    """What Serve makes spans of: every request, or none."""
    return TracingConfig(enabled=settings.traces, exporter_import_path=EXPORTER, sampling_ratio=1.0)


def check_places(settings: ServeSettings) -> None:
    """Raise InputError where this Ray cannot hold what the settings ask for; a cluster may grow."""
    if os.environ.get(CLUSTER_ADDRESS):
        return
    wanted: Counter[str] = Counter()
    for place in places_of(settings):
        for resource, each in {"GPU": place.gpus, **place.resources}.items():
            wanted[resource] += place.replicas * each  # type: ignore[assignment]
    for resource, amount in wanted.items():
        if amount > (offered := total(resource)):
            raise InputError(
                f"the settings ask for {amount:g} {resource}, this machine offers {offered:g}: "
                "lower replicas, gpus or "
                f"resources, or write a config for a cluster (--config)"
            )


def first_key(settings: ServeSettings) -> str | None:
    """The text of a new key where there is none yet. Raises JobError where keys cannot be kept."""
    try:
        store = open_keys(settings.keys or Path(settings.folder) / KEYS, create=True)
        return None if store.list() else store.add("first", FIRST_SCOPES)[0]
    except KeysUnavailable as error:
        raise JobError(str(error)) from None


def write_config(settings: ServeSettings, path: Path) -> None:
    """A config for `serve deploy`: the application with these settings, and what its
    proxies need.
    """
    content = {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": "0.0.0.0",
            "port": settings.port,
            "request_timeout_s": settings.limits.deadline_s + NET_S,
        },
        "tracing_config": tracing(settings).model_dump(mode="json"),
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": settings.model_dump(mode="json", exclude_defaults=True)
                | {"model": settings.model},
            }
        ],
    }
    head = (
        f"# Written by lidit serve. Every Ray process needs {CALLBACK}={PLACE} in its "
        f"environment;\n# {MESSAGE_BYTES}={LONGEST_MESSAGE} and {PROXY_DIRECT}=1 make answers "
        "quicker.\n"
    )
    path.write_text(head + yaml.safe_dump(content, sort_keys=False))


def _only_here(host: str) -> bool:
    """Whether an address is this machine's own, which no other can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name: whoever it stands for
        return False


def _tell(settings: ServeSettings, key: str | None) -> None:
    url = settings.public_url or f"http://{settings.host}:{settings.port}"
    if settings.guards.words is None and settings.guards.probe is None:
        print("guards    none: every prompt is drawn, for everybody who has a key")
    print(f"page      {url}/")
    print(f"key       {key}" if key else "key       as before; lidit keys add makes another")
    shown = key or "$LIDIT_KEY"
    print(
        f"try       curl {url}/v1/images/generations -H 'Authorization: Bearer {shown}' "
        f"-H 'Content-Type: application/json' -d '{{\"prompt\": \"{EXAMPLE}\"}}'",
        flush=True,
    )
