"""How long work takes, and which kernels it runs."""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.run import Run

# The first pattern that a kernel's name matches says what it is for.
KINDS = {
    "attention": r"fmha|flash|sdpa|attention",
    "convolution": r"conv|implicit|wgrad|dgrad",
    "matrix product": r"gemm|nvjet|cutlass|xmma|cublas|addmm|aten::mm|aten::bmm",
    "triton": r"triton|^Compiled",
    "optimizer": r"multi_tensor|adam|foreach|lerp",
    "copy": r"memcpy|memset|copy",
    "reduction": r"reduce|norm|sum",
}


def synchronise(run: Run) -> None:
    if run.cuda:
        torch.cuda.synchronize()


def wall(run: Run, work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    synchronise(run)
    began = time.perf_counter()
    work()
    synchronise(run)
    return time.perf_counter() - began


def median(run: Run, work: Callable[[], Any], rounds: int, warm: int = 2) -> float:
    """Median seconds of a call."""
    for _ in range(warm):
        work()
    return statistics.median(wall(run, work) for _ in range(rounds))


def each(run: Run, work: Callable[[], Any], calls: int = 20, warm: int = 3) -> float:
    """Seconds of a call among `calls` that are queued one behind the other, as kernels in a model
    are.
    """
    for _ in range(1 if run.toy else warm):
        work()
    calls = 2 if run.toy else calls

    def queue() -> None:
        for _ in range(calls):
            work()

    return wall(run, queue) / calls


class Marks:
    """Places in a step; `spans` are the milliseconds from each to the next, on the GPU's clock
    where there is a GPU.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.places: list[tuple[str, Any]] = []

    def __call__(self, name: str) -> None:
        if not self.run.cuda:
            self.places.append((name, time.perf_counter() * 1e3))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.places.append((name, event))

    def spans(self) -> dict[str, float]:
        synchronise(self.run)
        pairs = zip(self.places, self.places[1:])
        return {
            name: first.elapsed_time(second) if self.run.cuda else second - first
            for (name, first), (_, second) in pairs
        }


def kernels(run: Run, work: Callable[[], Any], steps: int = 1, top: int = 10) -> dict[str, Any]:
    """What the GPU ran in `steps` calls: milliseconds per call by kernel and by kind, and how busy
    it was.

    On a CPU torch's operators stand for the kernels.
    """
    activity = ProfilerActivity.CUDA if run.cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        seconds = wall(run, lambda: [work() for _ in range(steps)])
    spent: dict[str, list[float]] = {}
    for event in profiler.events():
        if run.cuda and (
            event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False)
        ):
            continue
        micro = event.time_range.elapsed_us() if run.cuda else event.self_cpu_time_total
        spent.setdefault(event.name, []).append(micro)
    total = sum(map(sum, spent.values())) or 1.0
    ordered = sorted(spent.items(), key=lambda item: -sum(item[1]))
    kinds: dict[str, float] = {}
    for name, times in ordered:
        kinds[kind(name)] = kinds.get(kind(name), 0) + sum(times)
    return {
        "kernels_per_call": round(sum(map(len, spent.values())) / steps),
        "busy": round(total / 1e6 / seconds, 3),
        "milliseconds": round(total / 1e3 / steps, 3),
        "kinds": {
            name: round(micro / total, 3)
            for name, micro in sorted(kinds.items(), key=lambda item: -item[1])
        },
        "top": [
            {
                "name": name[:110],
                "ms": round(sum(times) / 1e3 / steps, 3),
                "share": round(sum(times) / total, 4),
                "calls": round(len(times) / steps, 1),
            }
            for name, times in ordered[:top]
        ],
    }


def kind(name: str) -> str:
    found = (label for label, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "elementwise and other")


@contextlib.contextmanager
def cudnn_attention(enabled: bool) -> Iterator[None]:
    """Whether attention may take cuDNN's kernels."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
