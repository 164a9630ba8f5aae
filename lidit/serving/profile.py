"""How many rows a pass of one latent size should have, found by running passes.

A pass of more rows pays while it draws more rows per second, which ends early where a row is large, and while its
memory is there. Both depend on model, size and device: they are measured, never assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from lidit.config import SamplerSettings
from lidit.diffusion.stepper import Caption, Stepper

GAIN = 1.05  # rows per second, of twice the rows, below which more rows only make everybody wait
MEMORY_SHARE = 0.5  # of what is free: codec and LLMs may want the rest
REPETITIONS = 3
MOST_ROWS = 128
CAPTION_TOKENS = 64

Size = tuple[int, int]  # latent height and width


@dataclass(frozen=True)
class Pass:
    """One measured pass: rows, seconds of the fastest repetition, bytes above what was in use before."""

    rows: int
    seconds: float
    memory: int


def row_cap(passes: Sequence[Pass], memory: int) -> int:
    """The most rows that fit into `memory` bytes and pay. `passes`: of rising numbers of rows, from 1."""
    cap = 1
    for fewer, more in pairwise(passes):
        gain = (more.rows / more.seconds) / (fewer.rows / fewer.seconds)
        if more.memory > memory or gain < GAIN:
            break
        cap = more.rows
    return cap


class Capacity:
    """The row cap of each latent size on this machine, measured when a size is first asked for."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.measured: dict[Size, int] = {}

    def __call__(self, size: Size) -> int:
        """Rows of a pass at most; a guided row counts twice."""
        if size not in self.measured:
            memory = int(MEMORY_SHARE * free_memory(self.stepper.device))
            self.measured[size] = row_cap(list(self._passes(size, memory)), memory)
        return self.measured[size]

    def _passes(self, size: Size, memory: int) -> Iterator[Pass]:
        """Passes of 1, 2, 4, ... rows, until one does not pay or the next would not fit."""
        passes: list[Pass] = []
        rows = 1
        while rows <= MOST_ROWS:
            try:
                done = self._pass(size, rows)
            except torch.OutOfMemoryError:
                return
            yield done
            passes.append(done)
            if row_cap(passes, memory) < rows or 2 * done.memory > memory:
                return
            rows *= 2

    def _pass(self, size: Size, rows: int) -> Pass:
        """Measure one pass of unguided rows, no two of one caption."""
        shape = (self.stepper.model.config.channels, *size)
        sampler = SamplerSettings(steps=REPETITIONS + 1, guidance_scale=1)
        captions = [Caption(f"profile {row}", self._states()) for row in range(rows)]
        made = [self.stepper.row(caption, sampler, 0, shape) for caption in captions]
        # The first one pays for what later ones find ready: kernels, plans, memory.
        memory = peak_memory(self.stepper.device, lambda: self.stepper.advance(made))
        seconds = []
        for _ in range(REPETITIONS):
            synchronise(self.stepper.device)
            began = time.perf_counter()
            self.stepper.advance(made)
            synchronise(self.stepper.device)
            seconds.append(time.perf_counter() - began)
        return Pass(rows, min(seconds), memory)

    def _states(self) -> dict[str, torch.Tensor]:
        return {name: entry.states[0, :1].expand(CAPTION_TOKENS, -1) for name, entry in self.stepper.empty.items()}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken: of the GPU with torch's own reserve, else of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable") << 10


def peak_memory(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that `work` needs above what is in use now. On a CPU pages that are kept from before do not count."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _kibibytes(status, "VmRSS")
    work()
    return max(_kibibytes(status, "VmHWM") - before, 0) << 10


def _kibibytes(file: Path, name: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
