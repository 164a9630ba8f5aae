"""One training step as a single GPU takes it under ZeRO-1, without DeepSpeed: bfloat16 weights and
gradients, float32 master weights with torch's fused AdamW, gradient clipping, and an average of the
weights.

Legend: B batch, T caption tokens of an LLM, padded to the longest.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from benchmarks.model import BILLION, LLMS, Shape, build_lidit, lidit_inputs
from lidit.models.compiled import BLOCKS, compile_blocks
from lidit.models.flops import forward_flops
from pipelines.training.mfu import utilisation

TOY = Shape(32, 2, 2, 2, 4, 8, 8, 4, 16, batch=2, sampling_batch=2, rounds=2)
LEARNING_RATE, CLIP, AVERAGED = 1e-6, 1.0, 1e-4
LONGEST = 256


def shape_of(run: Run) -> Shape:
    return TOY if run.toy else BILLION


def recompile(model: torch.nn.Module, run: Run, dynamic: bool | None) -> None:
    """Compiles the model's blocks anew; in a dry run they are only traced."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    # Sizes that happen to be equal are not the same size: another caption length would compile
    # again.
    torch.fx.experimental._config.use_duck_shape = False
    # That cache does not know which attention kernels are allowed, and would give back those of
    # another switch.
    torch._functorch.config.enable_autograd_cache = False
    compile_blocks(model, dynamic, "inductor" if run.cuda else "eager")


def uncompile(model: torch.nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, BLOCKS):
            part._compiled_call_impl = None


class Trainer:
    """The model with its optimizer and average."""

    def __init__(self, run: Run) -> None:
        torch.manual_seed(0)
        self.run, self.shape = run, shape_of(run)
        self.dtype = torch.bfloat16 if run.cuda else torch.float32
        self.model = build_lidit(self.shape, run.device, self.dtype)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.masters = [
            torch.nn.Parameter(weight.detach().float().clone()) for weight in self.weights
        ]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.average = [master.detach().clone() for master in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=True)

    def batch(
        self, size: int, lengths: torch.Tensor | None = None, rounded: int = 1
    ) -> dict[str, Any]:
        """Random inputs; `lengths` [2, B] of the captions in each LLM's tokens (default: as
        benchmarks.model), padded to the longest, rounded up to a multiple of `rounded`.
        """
        if lengths is None:
            longest = self.shape.caption
            lengths = torch.randint(longest // 2, longest + 1, (len(LLMS), size))
            lengths[:, 0] = longest
        tokens = math.ceil(int(lengths.max()) / rounded) * rounded
        found = lidit_inputs(self.shape, lengths, tokens, self.run.device, self.dtype)
        return {**found, "lengths": lengths, "tokens": tokens}

    def step(
        self,
        batch: dict[str, Any],
        mark: Callable[[str], None] = lambda _name: None,
        check: Callable[[torch.Tensor], None] = lambda _value: None,
    ) -> torch.Tensor:
        """One step. `mark` is told where a phase begins; `check` gets what an engine looks at in a
        step: the loss before the backward pass, the norm after it.
        """
        mark("forward")
        prediction = self.model(batch["latents"], batch["t"], batch["text"])
        loss = (prediction.float() - batch["noise"].float()).square().mean()
        check(loss)
        mark("backward")
        loss.backward()
        mark("clip")
        torch._foreach_copy_(
            [master.grad for master in self.masters], [weight.grad for weight in self.weights]
        )
        for weight in self.weights:
            weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, CLIP, foreach=True)
        check(norm)
        mark("optimizer")
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
            mark("average")
            torch._foreach_lerp_(self.average, self.masters, AVERAGED)
        mark("end")
        return loss.detach()

    def condition(self, batch: dict[str, Any]) -> None:
        """Forward and backward of the conditioner alone."""
        condition = self.model.conditioner(batch["text"], batch["t"])
        (
            condition.tokens.float().square().mean() + condition.pooled.float().square().mean()
        ).backward()
        for weight in self.weights:
            weight.grad = None

    def flops(self, tokens: Sequence[float]) -> float:
        """FLOPs of one image's training step; `tokens` of its caption in each LLM."""
        captions = dict(zip(LLMS, tokens, strict=True))
        size = (self.shape.latent, self.shape.latent)
        return 3 * sum(
            forward_flops(
                self.model, size, captions, dict.fromkeys(LLMS, self.shape.prefix)
            ).values()
        )

    def share_of_peak(self, flops: float, seconds: float) -> float | None:
        share = utilisation(flops, seconds, self.run.device)
        return None if share is None else round(share, 4)

    def measure(self, size: int, steps: int = 8, warm: int = 3) -> dict[str, Any]:
        """Steps of one shape: milliseconds on the clock, of each phase, and until the CPU has
        queued a step.
        """
        for weight in self.weights:
            weight.grad = None  # of a step that ran out of memory
        if self.run.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        batch = self.batch(size)
        steps, warm = (1, 1) if self.run.toy else (steps, warm)
        began = time.perf_counter()
        for _ in range(warm):
            self.step(batch)
        timing.synchronise(self.run)
        warming = time.perf_counter() - began
        clocks, queued, phases = [], [], []
        for _ in range(steps):
            marks = timing.Marks(self.run)
            timing.synchronise(self.run)
            began = time.perf_counter()
            self.step(batch, marks)
            queued.append(time.perf_counter() - began)
            timing.synchronise(self.run)
            clocks.append(time.perf_counter() - began)
            phases.append(marks.spans())
        seconds = statistics.median(clocks)
        flops = size * self.flops([batch["tokens"]] * 2)
        found = {
            "batch": size,
            "warm_up_seconds": round(warming, 2),
            "step_ms": round(1e3 * seconds, 2),
            "queued_ms": round(1e3 * statistics.median(queued), 2),
            "phases_ms": {
                name: round(statistics.median(p[name] for p in phases), 2) for name in phases[0]
            },
            "images_per_second": round(size / seconds, 1),
            "mfu": self.share_of_peak(flops, seconds),
        }
        if self.run.cuda:
            found["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        return found

    def as_drawn(self, size: int, steps: int, rounded: int, most_seconds: float) -> dict[str, Any]:
        """Steps whose captions have the lengths of real ones; stops after `most_seconds`."""
        began, lengths = time.monotonic(), drawn_lengths(size)
        clocks, shapes, useful, computed = [], set[int](), 0.0, 0.0
        for number in range(2 if self.run.toy else steps):
            if number and (time.monotonic() - began > most_seconds or self.run.left() < 3):
                break
            batch = self.batch(size, next(lengths), rounded)
            clocks.append(timing.wall(self.run, lambda: self.step(batch)))  # noqa: B023 - called at once
            shapes.add(batch["tokens"])
            useful += size * self.flops(batch["lengths"].float().mean(1).tolist())
            computed += size * self.flops([batch["tokens"]] * 2)
        ordered = sorted(clocks)
        return {
            "batch": size,
            "steps": len(clocks),
            "lengths": len(shapes),
            "step_ms": round(1e3 * statistics.median(clocks), 1),
            "step_ms_mean": round(1e3 * statistics.mean(clocks), 1),
            "step_ms_p90": round(1e3 * ordered[int(0.9 * (len(ordered) - 1))], 1),
            "first_half_seconds": round(sum(clocks[: len(clocks) // 2]), 2),
            "second_half_seconds": round(sum(clocks[len(clocks) // 2 :]), 2),
            "images_per_second": round(size * len(clocks) / sum(clocks), 1),
            "mfu_useful": self.share_of_peak(useful, sum(clocks)),
            "mfu_computed": self.share_of_peak(computed, sum(clocks)),
        }


def drawn_lengths(size: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Caption lengths [2, B] without end: two thirds short captions, one third long, the second
    LLM's a tenth more.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        short = torch.randint(8, 25, (size,), generator=generator).float()
        long = 100 + 30 * torch.randn(size, generator=generator)
        first = torch.where(torch.rand(size, generator=generator) < 1 / 3, long, short)
        yield torch.stack([first, 1.1 * first]).round().long().clamp(4, LONGEST)
