"""Part 1: what the first call of a new caption length costs, with cuDNN's attention
and without it.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from benchmarks.gpu import timing
from benchmarks.gpu.kernels import SHAPES, Attention, dtype_of
from benchmarks.gpu.run import Run
from lidit.models.layers import attend

NEW_LENGTHS = 10


def part_1(run: Run) -> None:
    shapes = {shape.name: shape for shape in SHAPES}
    for name in ("cross", "embed", "refiner"):
        for enabled in (False, True):
            label = f"{name}, cuDNN {'on' if enabled else 'off'}"
            found = run.attempt(label, lambda: new_lengths(run, shapes[name], enabled), needs=2)  # noqa: B023
            if found:
                run.headline(f"{label}: {found['first_ms']:.0f} then {found['second_ms']:.1f} ms")


def new_lengths(run: Run, shape: Attention, enabled: bool) -> dict[str, Any]:
    """Milliseconds of the first and of the second call (forward and backward where it trains) of
    lengths never seen.
    """
    firsts, seconds = [], []
    with timing.cudnn_attention(enabled):
        for number in range(3 if run.toy else NEW_LENGTHS + 1):
            if run.left() < 3 and len(firsts) > 1:
                break
            longer = replace(shape, keys=shape.keys + 1 + 7 * number)
            longer = replace(longer, queries=longer.keys) if shape.queries == shape.keys else longer
            tensors = longer.tensors(run, dtype_of(run))

            def call() -> None:
                attended = attend(**tensors)  # noqa: B023 - called at once
                if shape.trains:
                    attended.float().square().mean().backward()

            firsts.append(1e3 * timing.wall(run, call))
            seconds.append(1e3 * timing.wall(run, call))
    firsts, seconds = firsts[1:], seconds[1:]  # the first length of all also loads libraries
    return {
        "lengths": len(firsts),
        "first_ms": round(statistics.median(firsts), 2),
        "first_ms_worst": round(max(firsts), 2),
        "second_ms": round(statistics.median(seconds), 2),
    }
