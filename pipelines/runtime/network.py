"""The network between training's processes, tried by what training asks of it: sums over all of
them.
"""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lidit.errors import JobError, one_line

MEGABYTES = {"cuda": 256, "cpu": 8}
ROUNDS, WARM_UP = 10, 3
# a process imports torch first, on a machine that may be busy
START_SECONDS, REDUCE_SECONDS = 300, 120


@dataclass(frozen=True)
class Reduction:
    """What one process of the probe saw.

    `seconds`: of one sum; `locked`: bytes of memory that may be locked, -1 without limit;
    `adapters`: of RDMA.
    """

    node: str
    backend: str
    bytes: int
    seconds: float
    locked: int
    adapters: int


@dataclass(frozen=True)
class NetworkProbe:
    """An all-reduce over a cluster: `bandwidth` in bytes/s is comparable for any number of
    processes.

    A ring moves 2 (n - 1) / n of the bytes through every process ("bus bandwidth" of nccl-tests).
    """

    processes: int
    nodes: int
    backend: str
    bandwidth: float
    least_locked: int
    least_adapters: int

    @classmethod
    def of(cls, seen: Sequence[Reduction]) -> NetworkProbe:
        slowest, count = max(one.seconds for one in seen), len(seen)
        locked = [one.locked for one in seen if one.locked >= 0]
        return cls(
            processes=count,
            nodes=len({one.node for one in seen}),
            backend=seen[0].backend,
            bandwidth=seen[0].bytes / slowest * 2 * (count - 1) / count,
            least_locked=min(locked) if locked else -1,
            least_adapters=min(one.adapters for one in seen),
        )


class Member:
    """One process of the probe; made an actor by `probe_network`."""

    def address(self) -> str:
        """Where this process can be met, as HOST:PORT."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((host, 0))
            return f"{host}:{free.getsockname()[1]}"

    def reduce(self, rank: int, world_size: int, address: str, on_gpu: bool) -> Reduction:
        """Sum a tensor over all members, and time it. JobError where the sum is wrong."""
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        backend = "nccl" if on_gpu else "gloo"
        limit = timedelta(seconds=REDUCE_SECONDS)
        dist.init_process_group(
            backend, f"tcp://{address}", timeout=limit, world_size=world_size, rank=rank
        )
        try:
            seconds = timed_sum(device, rank, world_size, MEGABYTES[device.type])
        finally:
            dist.destroy_process_group()
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        return Reduction(
            node=ray.util.get_node_ip_address(),
            backend=backend,
            bytes=MEGABYTES[device.type] * 2**20,
            seconds=seconds,
            locked=-1 if locked == resource.RLIM_INFINITY else locked,
            adapters=len(list(Path("/dev/infiniband").glob("uverbs*"))),
        )


def timed_sum(device: torch.device, rank: int, world_size: int, megabytes: int) -> float:
    """Seconds of one all-reduce of float32 among the processes of the default group."""
    tensor = torch.full((megabytes * 2**18,), float(rank + 1), device=device)
    dist.all_reduce(tensor)
    if not bool((tensor == world_size * (world_size + 1) / 2).all()):
        raise JobError(f"process {rank} of {world_size}: the sum over all processes is wrong")
    for _ in range(WARM_UP):
        dist.all_reduce(tensor.zero_())
    _wait(device)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor)
    _wait(device)
    return (time.perf_counter() - began) / ROUNDS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def probe_network() -> NetworkProbe:
    """All-reduce over every free GPU of the cluster, or over two CPU processes where it has none.

    Call after `connect`. Raises JobError where the processes do not start or do not meet in time.
    """
    free = ray.available_resources()
    gpus = int(free.get("GPU", 0))
    count, each = (gpus, {"GPU": 1}) if gpus else (2, {"CPU": 1})
    group = placement_group([dict(each)] * count, strategy="PACK" if gpus else "SPREAD")
    members: list[Any] = []
    try:
        if not group.wait(START_SECONDS):
            raise JobError(
                f"no place for {count} processes with {each} each within {START_SECONDS} s"
            )
        for place in range(count):
            inside = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place)
            kind = ray.remote(
                num_cpus=each.get("CPU", 0), num_gpus=each.get("GPU", 0), scheduling_strategy=inside
            )
            members.append(kind(Member).remote())
        address = ray.get(members[0].address.remote(), timeout=START_SECONDS)
        calls = [
            member.reduce.remote(rank, count, address, bool(gpus))
            for rank, member in enumerate(members)
        ]
        return NetworkProbe.of(ray.get(calls, timeout=START_SECONDS + REDUCE_SECONDS))
    except ray.exceptions.GetTimeoutError:
        raise JobError(
            f"{count} processes did not meet within {START_SECONDS + REDUCE_SECONDS} s"
        ) from None
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        raise JobError(one_line(cause or error, 300)) from None
    finally:
        for member in members:
            ray.kill(member)
        remove_placement_group(group)
