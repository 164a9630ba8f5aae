"""Where jobs meet Ray: join the cluster we were submitted to, or start an embedded one.

Ray is imported when it is first needed: a job that finds everything finished never pays for it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lidit.config import EngineSettings, PoolSettings
from lidit.errors import InputError, JobError, one_line
from pipelines.runtime import embedded
from pipelines.runtime.joined import CLUSTER_ADDRESS, join

log = logging.getLogger(__name__)
FEW_UNITS = 2  # that one process computes while a Ray would still be starting


def connect(cpus: int = 1, temp_dir: str | None = None) -> None:
    """Join the cluster named by RAY_ADDRESS; without one, embed a Ray of `cpus` logical CPUs in
    this process.

    An embedded cluster may be told of more CPUs than the machine has: actors that wait for each
    other (a trainer and its readers) need a logical CPU each, and too few means waiting for ever.
    An embedded Ray that runs already cannot
    grow, so a warning names what it lacks: a job of several stages asks for the most of them at its
    first.
    """
    import ray

    if ray.is_initialized():
        if not os.environ.get(CLUSTER_ADDRESS) and (offered := total("CPU")) < cpus:
            log.warning(
                "Ray already runs in this process with %g logical CPUs, this job asks for %d "
                "and may wait for ever; "
                "call ray.shutdown() before it",
                offered,
                cpus,
            )
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "include_dashboard": False}
    if os.environ.get(CLUSTER_ADDRESS):
        join(os.environ[CLUSTER_ADDRESS])
    else:
        embedded.start(max(cpus, os.cpu_count() or 1), temp_dir, quiet)


def is_alone() -> bool:
    """Whether this process is part of no cluster so far, and named none to join."""
    ray = sys.modules.get("ray")
    return not os.environ.get(CLUSTER_ADDRESS) and not (ray and ray.is_initialized())


def is_small(pool: PoolSettings, units: int) -> bool:
    """Whether this process has computed `units` sooner than a Ray of its own has started."""
    placed = pool.gpus or pool.resources or pool.label_selector
    return units <= FEW_UNITS and pool.actors == 1 and not placed and is_alone()


def cluster_resources() -> dict[str, float]:
    """What the whole cluster has: CPU, GPU, memory and its own resources."""
    import ray

    return dict(ray.cluster_resources())


def total(resource: str) -> float:
    """How much of a resource ("CPU", "GPU") the whole cluster has."""
    return cluster_resources().get(resource, 0.0)


def worker_pool(engine: EngineSettings) -> PoolSettings:
    """Training's workers, as a pool."""
    return PoolSettings(
        actors=engine.min_workers or engine.workers,
        cpus=engine.cpus_per_worker,
        gpus=engine.gpus_per_worker,
        resources=engine.resources,
        label_selector=engine.label_selector,
    )


def demands(pool: PoolSettings) -> dict[str, Any]:
    """What one actor or task of a pool asks of the cluster, as Ray's options."""
    asked: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus}
    if pool.resources:
        asked["resources"] = dict(pool.resources)
    if pool.label_selector:
        asked["label_selector"] = dict(pool.label_selector)
    return asked


def check_resources(
    pool: PoolSettings,
    who: str = "pool: {} actors",
    lower: str = "pool.actors, pool.cpus or pool.gpus",
) -> None:
    """Raise InputError where an embedded Ray cannot hold the pool: it never grows, asking for more
    waits for ever.

    who: what the message calls the pool's members; lower: the settings that the user can change.
    Call after `connect`.
    A cluster is not checked: it may grow when actors wait for a place.
    """
    if os.environ.get(CLUSTER_ADDRESS):
        return
    for resource, each in _of_each(pool).items():
        wanted, offered = pool.actors * each, total(resource)
        if wanted > offered:
            raise InputError(
                f"{who.format(pool.actors)} ask for {wanted:g} {resource}, this machine offers "
                f"{offered:g}; lower "
                f"{lower}, or set {CLUSTER_ADDRESS} to a cluster"
            )


def check_together(pools: Sequence[PoolSettings], who: str) -> None:
    """`check_resources` for pools that compute at the same time. who: what they are, in words."""
    if os.environ.get(CLUSTER_ADDRESS):
        return
    wanted: dict[str, float] = {}
    for pool in pools:
        for resource, each in _of_each(pool).items():
            wanted[resource] = wanted.get(resource, 0.0) + pool.actors * each
    for resource, asked in wanted.items():
        if asked > (offered := total(resource)):
            raise InputError(
                f"{who} beside each other ask for {asked:g} {resource}, this machine offers "
                f"{offered:g}; lower pool.actors, online.max_actors or engine.workers, or compute "
                f"the states before with lidit embed, or set {CLUSTER_ADDRESS} to a cluster"
            )


def _of_each(pool: PoolSettings) -> dict[str, float]:
    """What each actor of a pool asks for."""
    return {"CPU": pool.cpus, "GPU": pool.gpus, **pool.resources}


def check_engine(engine: EngineSettings) -> None:
    """`check_resources` for training's workers."""
    lower = "engine.workers, engine.cpus_per_worker or engine.gpus_per_worker"
    check_resources(worker_pool(engine), "engine: {} workers", lower)


@contextmanager
def plain_errors(died: str) -> Iterator[None]:
    """Ray's errors as the user's: what a task raised on purpose as it was; `died` and why, where
    its worker died.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError | JobError):
            raise error.cause from None
        # the second is torch's, not loaded here
        if type(error.cause).__name__ in ("MemoryError", "OutOfMemoryError"):
            reason = one_line(error.cause, 300)
            raise JobError(
                f"out of memory: {reason}; ask for fewer at once or for more per worker"
            ) from None
        raise
    except ray.exceptions.RayError as error:
        reason = one_line(error, 300)
        raise JobError(f"{died}: {reason}") from None
