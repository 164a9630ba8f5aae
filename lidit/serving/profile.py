"""How many rows a pass of one latent size should have, found by running passes.

A pass of more rows pays while it draws more rows per second, which ends early where a row is large,
and while its memory is there. Both depend on model, size and device: they are measured, never
assumed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from lidit.config import SamplerSettings
from lidit.diffusion.stepper import Caption, Row, Stepper

ENOUGH = 0.9  # of the best rate: more rows than that takes only make everybody wait
# Times a single image's pass: what a short request may have to bear beside others. Less would cost
# more of the rate than short requests gain: benchmarks/README.md has both.
BRISK = 3.0
GAIN = 1.05  # of rate: two passes in a row with less end the measuring
MEMORY_SHARE = 0.5  # of what is free: codec and LLMs may want the rest
REPETITIONS = 3
MOST_ROWS = 64
CAPTION_TOKENS = 64
MEMORY = Path("/proc/meminfo")

Size = tuple[int, int]  # latent height and width


@dataclass(frozen=True)
class Pass:
    """One measured pass: rows, seconds of the fastest repetition, bytes above what was in use
    before.
    """

    rows: int
    seconds: float
    memory: int

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds


def row_cap(passes: Sequence[Pass], memory: int) -> int:
    """The fewest rows that come near the best rate, of the passes that fit into `memory` bytes."""
    fitting = [done for done in passes if done.memory <= memory] or passes[:1]
    best = max(done.rate for done in fitting)
    return min(done.rows for done in fitting if done.rate >= ENOUGH * best)


def brisk_rows(passes: Sequence[Pass]) -> int:
    """The most rows of a pass that takes at most `BRISK` times as long as a single image's: what is
    between two measured passes is taken to lie on a straight line.
    """
    limit, rows = BRISK * passes[0].seconds, passes[0].rows
    for small, large in pairwise(passes):
        if large.seconds > limit:
            share = (limit - small.seconds) / (large.seconds - small.seconds)
            return small.rows + int(share * (large.rows - small.rows))
        rows = large.rows
    return rows


def still_pays(passes: Sequence[Pass]) -> bool:
    """Whether larger passes are worth a try: a single slow pass may be another process's doing."""
    if len(passes) < 3:
        return True
    return max(done.rate for done in passes[-2:]) >= GAIN * max(done.rate for done in passes[:-2])


class Capacity:
    """The row caps of each latent size on this machine, measured when a size is first asked for."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.measured: dict[Size, tuple[int, int]] = {}

    def __call__(self, size: Size) -> int:
        """Rows of a pass at most; a guided row counts twice."""
        return self._caps(size)[0]

    def brisk(self, size: Size) -> int:
        """Rows of a pass at most that a short request takes part in."""
        return self._caps(size)[1]

    def _caps(self, size: Size) -> tuple[int, int]:
        if size not in self.measured:
            memory = int(MEMORY_SHARE * free_memory(self.stepper.device))
            passes = list(self._passes(size, memory))
            cap = row_cap(passes, memory)
            self.measured[size] = cap, min(brisk_rows(passes), cap)
        return self.measured[size]

    def _passes(self, size: Size, memory: int) -> Iterator[Pass]:
        """Passes of 1, 2, 4, ... images, until more do not pay or would not fit."""
        passes: list[Pass] = []
        images = 1
        while 2 * images <= MOST_ROWS and still_pays(passes):
            try:
                passes.append(self._pass(size, images))
            except torch.OutOfMemoryError:
                if not passes:
                    raise  # not even one image fits
                return
            yield passes[-1]
            if 2 * passes[-1].memory > memory:
                return
            images *= 2

    def _pass(self, size: Size, images: int) -> Pass:
        """Measure one pass of guided images, as most are, no two of one caption."""
        shape = (self.stepper.model.config.channels, *size)
        sampler = SamplerSettings(steps=REPETITIONS + 1, guidance_scale=2)
        captions = [Caption(f"profile {number}", self._states()) for number in range(images)]
        rows = [self.stepper.row(caption, sampler, 0, shape) for caption in captions]
        # The first one pays for what later ones find ready: kernels, plans, memory.
        memory = peak_memory(self.stepper.device, lambda: self.stepper.advance(rows))
        seconds = [self._seconds(rows) for _ in range(REPETITIONS)]
        each = 1 if self.stepper.model.takes_guidance else 2
        return Pass(each * images, min(seconds), memory)

    def _seconds(self, rows: Sequence[Row]) -> float:
        """Of one pass. On a CPU this thread's own time: other processes must not
        make up the cap.
        """
        if self.stepper.device.type != "cuda":
            began = time.thread_time()
            self.stepper.advance(rows)
            return time.thread_time() - began
        torch.cuda.synchronize(self.stepper.device)
        began = time.perf_counter()
        self.stepper.advance(rows)
        torch.cuda.synchronize(self.stepper.device)
        return time.perf_counter() - began

    def _states(self) -> dict[str, torch.Tensor]:
        return {
            name: entry.states[0, :1].expand(CAPTION_TOKENS, -1)
            for name, entry in self.stepper.empty.items()
        }


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken: of the GPU with torch's own reserve, else of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _kibibytes(MEMORY, "MemAvailable") << 10 if MEMORY.is_file() else sys.maxsize


def peak_memory(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that `work` needs above what is in use now. On a CPU pages that are kept from before do
    not count.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if not MEMORY.is_file():  # not Linux: time alone decides
        work()
        return 0
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _kibibytes(status, "VmRSS")
    work()
    return max(_kibibytes(status, "VmHWM") - before, 0) << 10


def _kibibytes(file: Path, name: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
