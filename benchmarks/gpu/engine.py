"""Part 9: the step that a training takes, by its own engine under DeepSpeed, at the 1B shape on one
GPU.

Forward and backward pass, ZeRO-1's master weights and optimizer, clipping, the average of the
weights, the checks of loss and gradient: all of `pipelines.training.engine`. Batches are on the GPU
already, but where they come as the feed gives them.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from benchmarks.gpu.trainer import drawn_lengths, shape_of
from benchmarks.model import LLMS, lidit_inputs
from lidit.config import (
    EncoderSettings,
    EngineSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    Recipe,
    TrainSettings,
)
from lidit.data.ahead import copied_ahead, with_tensors
from lidit.data.assembler import TrainingBatch
from lidit.diffusion import build_objective
from lidit.models import LIDiT, TextStates
from lidit.models.compiled import compile_blocks
from lidit.models.flops import forward_flops
from pipelines.training.engine import Engine, set_up_device
from pipelines.training.mfu import utilisation

MULTIPLE = 64  # as the engine rounds caption lengths on a GPU
COMPILING = 45  # seconds that a new set of graphs may take


class RealStep:
    """The engine of a 1B recipe, and batches for it."""

    def __init__(self, run: Run) -> None:
        self.run, self.shape = run, shape_of(run)
        shape = self.shape
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), LOCAL_RANK="0"
            )
        backend = "nccl" if run.cuda else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1)
        self.recipe = Recipe(
            name="bench",
            corpus="none",
            encoders=tuple(EncoderSettings(name=name, model="none") for name in LLMS),
            model=ModelSettings(
                width=shape.width, depth=shape.depth, heads=shape.heads, patch_size=shape.patch
            ),
            objective=ObjectiveSettings(kind="ddpm"),
            train=TrainSettings(
                batch_size=shape.batch, optimizer=OptimizerSettings(warmup_steps=0, lr=1e-5)
            ),
            engine=EngineSettings(
                zero_stage=1,
                precision="bfloat16" if run.cuda else "float32",
                gpus_per_worker=1 if run.cuda else 0,
                compile=False,  # measured first; `part_9` compiles afterwards
            ),
        )
        torch.manual_seed(0)
        device = set_up_device(self.recipe.engine)
        model = LIDiT.from_settings(
            self.recipe.model, dict.fromkeys(LLMS, shape.encoder_width), shape.channels
        )
        self.engine = Engine(
            self.recipe, model.train(), build_objective(self.recipe.objective), device
        )

    def batch(self, step: int, size: int, lengths: torch.Tensor) -> TrainingBatch:
        """Random inputs with captions of `lengths` [2, B] tokens."""
        found = lidit_inputs(
            self.shape, lengths, int(lengths.max()), self.engine.device, torch.float32
        )
        noise = found["noise"].float()
        keys = tuple(map(str, range(size)))
        return TrainingBatch(
            step, keys, found["latents"], noise, found["t"], found["text"], int(lengths.sum())
        )

    def flops(self, tokens: list[float]) -> float:
        """FLOPs of one image's step."""
        captions = dict(zip(LLMS, tokens, strict=True))
        size = (self.shape.latent, self.shape.latent)
        counts = forward_flops(
            self.engine.module, size, captions, dict.fromkeys(LLMS, self.shape.prefix)
        )
        return 3 * sum(counts.values())

    def fixed(self, size: int) -> torch.Tensor:
        """Lengths of a batch whose longest caption has the shape's tokens."""
        longest = self.shape.caption
        lengths = torch.randint(longest // 2, longest + 1, (len(LLMS), size))
        lengths[:, 0] = longest
        return lengths

    def measure(self, size: int, steps: int = 8, warm: int = 3) -> dict[str, Any]:
        """Steps of one shape."""
        if self.run.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        steps, warm = (1, 1) if self.run.toy else (steps, warm)
        batch, losses = self.batch(0, size, self.fixed(size)), []
        began = time.perf_counter()
        for _ in range(warm):
            losses.append(self.engine.train_step(batch).loss)
        timing.synchronise(self.run)
        warming = time.perf_counter() - began
        clocks = [
            timing.wall(self.run, lambda: losses.append(self.engine.train_step(batch).loss))
            for _ in range(steps)
        ]
        seconds = statistics.median(clocks)
        found = {
            "batch": size,
            "warm_up_seconds": round(warming, 2),
            "step_ms": round(1e3 * seconds, 2),
            "images_per_second": round(size / seconds, 1),
            "mfu": self._share(size * self.flops([self.shape.caption] * 2), seconds),
            "losses": [round(losses[0], 4), round(losses[-1], 4)],
        }
        if self.run.cuda:
            found["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        return found

    def as_drawn(self, size: int, most_seconds: float) -> dict[str, Any]:
        """Steps whose captions have the lengths of real ones; those that compile are told apart."""
        lengths, clocks, useful = drawn_lengths(size), [], []
        # other lengths than so far may compile
        self.engine.train_step(self.batch(0, size, next(lengths)))
        began = time.monotonic()
        for number in range(2 if self.run.toy else 40):
            if number and (time.monotonic() - began > most_seconds or self.run.left() < 3):
                break
            drawn = next(lengths)
            batch = self.batch(number, size, drawn)
            clocks.append(timing.wall(self.run, lambda: self.engine.train_step(batch)))  # noqa: B023 - called at once
            useful.append(size * self.flops(drawn.float().mean(1).tolist()))
        late = len(clocks) // 2
        return {
            "batch": size,
            "steps": len(clocks),
            "rounded_to": MULTIPLE,
            "first_half_seconds": round(sum(clocks[:late]), 2),
            "step_ms": round(1e3 * statistics.median(clocks), 1),
            "images_per_second": round(size * len(clocks[late:]) / sum(clocks[late:]), 1),
            "mfu_useful": self._share(sum(useful[late:]), sum(clocks[late:])),
        }

    def fed(self, size: int, steps: int) -> dict[str, Any]:
        """Steps whose batches are read from int8 families: pinned, copied a step ahead, made states
        by the model. Then the same batches from pageable memory, in the loop's own thread.
        """
        for name in LLMS:
            self.engine.module.conditioner.set_code(name, None)
        lengths, found = self.fixed(size), {}
        read = [self.stored(number, size, lengths) for number in range(3)]
        device, ready = self.engine.device, read
        if self.run.cuda:  # the feed's readers pin
            ready = [with_tensors(batch, torch.Tensor.pin_memory) for batch in read]
        for name, batches in (
            ("ahead", lambda: copied_ahead(cycle(ready), device)),
            ("in_the_loop", lambda: (batch.to(device) for batch in cycle(read))),
        ):
            feed = batches()
            self.engine.train_step(next(feed))
            seconds = statistics.median(
                timing.wall(self.run, lambda: self.engine.train_step(next(feed)))  # noqa: B023 - called at once
                for _ in range(1 if self.run.toy else steps)
            )
            found[f"{name}_step_ms"] = round(1e3 * seconds, 2)
            found[f"{name}_images_per_second"] = round(size / seconds, 1)
            useful = lengths.float().mean(1).tolist()
            found[f"{name}_mfu_useful"] = self._share(size * self.flops(useful), seconds)
        return {"batch": size, **found}

    def stored(self, step: int, size: int, lengths: torch.Tensor) -> TrainingBatch:
        """A batch as the feed makes it of int8 families, on the CPU."""
        longest = int(lengths.max())
        found = lidit_inputs(self.shape, lengths, 1, torch.device("cpu"), torch.float32)
        masks = torch.arange(longest) < lengths[..., None]
        text = {
            name: TextStates(
                torch.randint(-127, 128, (size, longest, self.shape.encoder_width)).to(torch.int8),
                masks[place],
                found["text"][name].prefix,
                torch.full((size, longest), 1 / 50),
            )
            for place, name in enumerate(LLMS)
        }
        keys = tuple(map(str, range(size)))
        tokens = int(lengths.sum())
        return TrainingBatch(step, keys, found["latents"], found["noise"], found["t"], text, tokens)

    def kernels(self, size: int) -> dict[str, Any]:
        """What the GPU runs in a step."""
        batch = self.batch(0, size, self.fixed(size))
        return timing.kernels(
            self.run, lambda: self.engine.train_step(batch), 1 if self.run.toy else 2, 20
        )

    def _share(self, flops: float, seconds: float) -> float | None:
        share = utilisation(flops, seconds, self.engine.device)
        return None if share is None or not math.isfinite(share) else round(share, 4)


def part_9(run: Run) -> None:
    began = time.monotonic()
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        run.report("engine", skipped="no DeepSpeed here")
        return
    real = RealStep(run)
    run.report("engine", seconds=round(time.monotonic() - began, 1))
    size = real.shape.batch
    _step(run, real, "eager", size)
    compile_blocks(real.engine.module, backend="inductor" if run.cuda else "eager")
    _step(run, real, "compiled", size, needs=COMPILING)
    run.attempt("compiled, kernels", lambda: real.kernels(size), needs=6)
    if not run.toy:
        _step(run, real, f"compiled, batch {size + size // 2}", size + size // 2)
    fed = run.attempt("compiled, fed int8", lambda: real.fed(size, 8), needs=8)
    if fed:
        run.headline(
            f"fed {fed['ahead_step_ms']:.0f} ms, in the loop {fed['in_the_loop_step_ms']:.0f}"
        )
    found = run.attempt("compiled, drawn", lambda: real.as_drawn(size, 12), needs=8)
    if found:
        run.headline(f"drawn {found['images_per_second']:.0f} images/s")
    dist.destroy_process_group()


def _step(run: Run, real: RealStep, name: str, size: int, needs: float = 6) -> None:
    found = run.attempt(name, lambda: real.measure(size), needs)
    if found:
        run.headline(f"{name} {found['step_ms']:.0f} ms, MFU {found['mfu'] or 0:.0%}")
