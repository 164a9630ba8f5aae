"""Part 10: what stacks of small models gain, as `benchmarks.gpu.evidence` trains the arms of an
ablation.

Letters: S models, B samples of each, T caption tokens, W width of an LLM.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from benchmarks.gpu.stacked import Stack, encoder_name
from lidit.config import LoopSettings, ModelSettings, ObjectiveSettings
from lidit.data.assembler import TrainingBatch
from lidit.diffusion import build_objective
from lidit.models import LIDiT, TextStates

STACKS = (1, 5, 25, 75)  # 15 arms with five seeds, and parts of them
TOKENS, SIDE = 64, 32


def part_10(run: Run) -> None:
    alone: float | None = None
    for count in STACKS[:2] if run.toy else STACKS:
        found = run.attempt(f"{count} models", lambda count=count: stack(run, count), needs=5)
        if found is None:
            continue
        alone = alone or found["step_ms"]
        gain = count * alone / found["step_ms"]
        run.headline(f"{count} models {found['step_ms']:.1f} ms ({gain:.1f} times one by one)")


def stack(run: Run, count: int) -> dict[str, Any]:
    """Milliseconds of a step of `count` models of the shape that `ablate-gpu` trains."""
    width, depth, size, of_llm = (32, 2, 2, 16) if run.toy else (256, 8, 64, 576)
    model = {"width": width, "depth": depth, "heads": 2 if run.toy else 8, "patch_size": 4}
    settings = ModelSettings.model_validate(model)
    torch.manual_seed(0)
    models = [LIDiT.from_settings(settings, {encoder_name(0): of_llm}, 3) for _ in range(count)]
    objective = build_objective(ObjectiveSettings(kind="clean"))
    trained = Stack(models, objective, LoopSettings(steps=100), run.device)
    batches = [_batch(run, size, of_llm) for _ in range(count)]
    losses: list[torch.Tensor] = []
    seconds = timing.median(
        run, lambda: losses.append(trained.step(batches)), 1 if run.toy else 5, warm=1
    )
    found: dict[str, Any] = {"step_ms": round(1e3 * seconds, 2), "models": count, "batch": size}
    if run.cuda:
        found["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    assert bool(torch.isfinite(losses[-1]).all())
    return found


def _batch(run: Run, size: int, width: int) -> TrainingBatch:
    with run.device:
        latents, noise = torch.randn(2, size, 3, SIDE, SIDE)
        mask = torch.arange(TOKENS) < torch.randint(TOKENS // 2, TOKENS + 1, (size, 1))
        text = TextStates(torch.randn(size, TOKENS, width), mask, torch.randn(4, width))
        u = torch.rand(size)
    keys = tuple(map(str, range(size)))
    return TrainingBatch(0, keys, latents, noise, u, {encoder_name(0): text}, 0)
