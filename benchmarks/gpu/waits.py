"""Part 8: what a step loses by waiting for the GPU's answer, as an engine does that looks at loss
and norm at once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from benchmarks.gpu.trainer import Trainer

LOOKS = 3  # values read after each of loss and norm: six waits per step


class Later:
    """Reads a value one step after it was asked for, when the GPU has long had it."""

    def __init__(self) -> None:
        self.waiting: torch.Tensor | None = None

    def __call__(self, value: torch.Tensor) -> None:
        if self.waiting is not None:
            float(self.waiting)
        self.waiting = value.detach()


def at_once(value: torch.Tensor) -> None:
    for _ in range(LOOKS):
        float(value.detach() + 0)


def part_8(run: Run) -> None:
    trainer = Trainer(run)
    size = trainer.shape.batch // 2  # few images: what the CPU does per step shows most
    for name, check in (
        ("nothing read", lambda _value: None),
        ("read at once", at_once),
        ("read later", Later()),
    ):
        run.attempt(name, lambda: reading(run, trainer, size, check), needs=3)  # noqa: B023 - called at once


def reading(
    run: Run, trainer: Trainer, size: int, check: Callable[[torch.Tensor], None]
) -> dict[str, float]:
    """Milliseconds of a step among several that follow each other."""
    batch = trainer.batch(size)
    steps = 2 if run.toy else 6
    rounds = [
        timing.wall(run, lambda: [trainer.step(batch, check=check) for _ in range(steps)]) / steps
        for _ in range(1 if run.toy else 3)
    ]
    milliseconds = round(1e3 * statistics.median(rounds), 2)
    run.headline(f"{milliseconds:.0f} ms")
    return {"batch": size, "step_ms": milliseconds}
