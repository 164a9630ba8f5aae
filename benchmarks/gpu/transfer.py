"""Part 3: a batch's way to the GPU: padded float32 as it is today, or what it holds, and what that
costs the CPU.

Legend: B batch, T tokens of a caption, N tokens of all captions, W width of an LLM.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from benchmarks.gpu.trainer import drawn_lengths
from lidit.models import TextStates
from lidit.store.packing import decode

LLM_COUNT = 2


class Batch:
    """Captions of one LLM as stored (int8 and a scale per token), of drawn lengths."""

    def __init__(self, run: Run) -> None:
        self.run = run
        size, self.width = (2, 16) if run.toy else (64, 4096)
        self.lengths = next(drawn_lengths(size))[0].tolist()
        tokens = sum(self.lengths)
        self.values = torch.randint(-127, 128, (tokens, self.width), dtype=torch.int8)  # [N, W]
        self.scale = torch.rand(tokens)  # [N]
        self.mean, self.deviation = torch.zeros(self.width), torch.ones(self.width)
        self.prefix = torch.zeros(0, self.width)

    def decoded(self) -> torch.Tensor:
        return decode(self.values, "int8", self.scale, self.mean, self.deviation)

    def padded(self) -> torch.Tensor:
        """float32 [B, T, W], as the feed makes it."""
        return TextStates.collate(list(self.decoded().split(self.lengths)), self.prefix).states

    def places(self) -> torch.Tensor:
        """Where each of the N tokens goes in the padded [B * T, W]."""
        longest = max(self.lengths)
        return torch.cat(
            [row * longest + torch.arange(length) for row, length in enumerate(self.lengths)]
        )


def part_3(run: Run) -> None:
    batch = Batch(run)
    run.attempt("to the GPU", lambda: copies(run, batch), needs=4)
    run.attempt("beside computation", lambda: overlap(run, batch), needs=3)
    run.attempt("CPU", lambda: processor(run, batch), needs=3)


def _pinned(run: Run, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if run.cuda else tensor


def copies(run: Run, batch: Batch) -> dict[str, Any]:
    """Milliseconds of one batch of two LLMs, and its bytes."""
    padded = batch.padded()
    stored, scale, places = (
        _pinned(run, part) for part in (batch.values, batch.scale, batch.places())
    )
    half = _pinned(run, padded.bfloat16())
    with run.device:
        target = torch.zeros(padded.shape[0] * padded.shape[1], batch.width, dtype=torch.bfloat16)

    def dequantised() -> None:
        values, factors, where = (
            part.to(run.device, non_blocking=True) for part in (stored, scale, places)
        )
        target[where] = (values * factors[:, None]).to(torch.bfloat16)

    found = {}
    for name, sent, work in (
        ("float32 padded, pageable", padded, lambda: padded.to(run.device, non_blocking=True)),
        ("bfloat16 padded, pinned", half, lambda: half.to(run.device, non_blocking=True)),
        ("int8 as stored, pinned, dequantised there", stored, dequantised),
    ):
        spent = LLM_COUNT * timing.median(run, work, 2 if run.toy else 9)
        found[name] = {
            "ms": round(1e3 * spent, 3),
            "megabytes": round(LLM_COUNT * sent.nbytes / 1e6, 2),
        }
    run.headline(" / ".join(f"{entry['ms']:.1f}" for entry in found.values()) + " ms")
    return found


def overlap(run: Run, batch: Batch) -> dict[str, Any]:
    """Milliseconds of computation alone, and with a batch copied beside it on another stream."""
    side = 64 if run.toy else 8192
    with run.device:
        matrix = torch.randn(side, side, dtype=torch.bfloat16 if run.cuda else torch.float32)
    stored = _pinned(run, batch.values)
    aside = torch.cuda.Stream() if run.cuda else None

    def compute() -> None:
        for _ in range(1 if run.toy else 30):
            matrix @ matrix

    def both() -> None:
        with torch.cuda.stream(aside):  # of None: the same stream
            for _ in range(LLM_COUNT):
                stored.to(run.device, non_blocking=True)
        compute()

    rounds = 2 if run.toy else 5
    alone, beside = timing.median(run, compute, rounds), timing.median(run, both, rounds)
    return {"alone_ms": round(1e3 * alone, 2), "beside_ms": round(1e3 * beside, 2)}


def processor(run: Run, batch: Batch) -> dict[str, Any]:
    """Milliseconds of decoding and of collating, with one and two threads; and of queueing small
    kernels alone and while two threads prepare batches, as the feed's readers do.
    """
    rounds = 1 if run.toy else 3
    threads, found = torch.get_num_threads(), {}
    for count in (1,) if run.toy else (1, 2):
        torch.set_num_threads(count)
        found[f"decode_{count}_threads_ms"] = round(
            1e3 * timing.median(run, batch.decoded, rounds, warm=1), 2
        )
        found[f"collate_{count}_threads_ms"] = round(
            1e3 * timing.median(run, batch.padded, rounds, warm=1), 2
        )
    torch.set_num_threads(1)
    small = torch.zeros(8, device=run.device)

    def launches() -> None:
        for _ in range(50 if run.toy else 4000):
            small.add_(1)

    alone = timing.median(run, launches, rounds)
    stop = threading.Event()

    def reader() -> None:
        while not stop.is_set():
            batch.padded()

    readers = [threading.Thread(target=reader, daemon=True) for _ in range(2)]
    for thread in readers:
        thread.start()
    try:
        beside = timing.median(run, launches, rounds)
    finally:
        stop.set()
        for thread in readers:
            thread.join()
        torch.set_num_threads(threads)
    run.headline(f"launches {beside / alone:.2f} times as long beside readers")
    return {
        **found,
        "launches_ms": round(1e3 * alone, 2),
        "launches_beside_readers_ms": round(1e3 * beside, 2),
    }
