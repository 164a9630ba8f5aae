"""Part 5: one guided sampling step of the 1B shape by dtype, compiled or not, for many prompts and
for a single one.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from benchmarks.gpu.trainer import recompile, shape_of, uncompile
from benchmarks.model import build_lidit, lidit_inputs
from lidit.config import SamplerSettings
from lidit.diffusion import GuidedPredictor
from lidit.models import LIDiT, TextStates


def part_5(run: Run) -> None:
    torch.manual_seed(0)
    shape = shape_of(run)
    model = build_lidit(shape, run.device, torch.float32).eval()
    for name, precision in (("float32", "highest"), ("TF32", "high")):
        torch.set_float32_matmul_precision(precision)
        run.attempt(name, lambda: step(run, model, many=True), needs=4)
    torch.set_float32_matmul_precision("high")
    model.to(torch.bfloat16 if run.cuda else torch.float32)
    run.attempt("bfloat16", lambda: step(run, model, many=True), needs=3)
    run.attempt("bfloat16, one prompt", lambda: step(run, model, many=False), needs=3)
    with timing.cudnn_attention(False):
        run.attempt("bfloat16, cuDNN off", lambda: step(run, model, many=True), needs=3)
    recompile(model, run, dynamic=False)
    run.attempt("bfloat16, compiled", lambda: step(run, model, many=True), needs=12)
    run.attempt("bfloat16, compiled, one prompt", lambda: step(run, model, many=False), needs=12)
    if run.cuda:
        run.attempt("bfloat16, compiled, CUDA graph", lambda: replayed(run, model), needs=4)
    uncompile(model)
    if run.cuda:
        run.attempt("bfloat16, CUDA graph", lambda: replayed(run, model), needs=4)


def _predictor(
    run: Run, model: LIDiT, many: bool
) -> tuple[GuidedPredictor, torch.Tensor, torch.Tensor]:
    """A predictor of as many prompts as images or of one, and its arguments."""
    shape = shape_of(run)
    size, dtype = shape.sampling_batch, next(model.parameters()).dtype
    lengths = torch.randint(shape.caption // 2, shape.caption + 1, (2, size if many else 1))
    inputs = lidit_inputs(shape, lengths, shape.caption, run.device, dtype)
    text: dict[str, TextStates] = inputs["text"]
    empty = {
        name: TextStates.collate([entry.states[0, :0]], entry.prefix)
        for name, entry in text.items()
    }
    rows = None if many else [0] * size
    latents = torch.randn(size, shape.channels, shape.latent, shape.latent, device=run.device)
    times = torch.full((size,), 0.5, device=run.device)
    return (
        GuidedPredictor(model, text, empty, SamplerSettings(guidance_scale=4), rows),
        latents,
        times,
    )


@torch.no_grad()
def step(run: Run, model: LIDiT, many: bool) -> dict[str, Any]:
    """Milliseconds of a step of guided images, and of the conditioner alone."""
    predict, latents, times = _predictor(run, model, many)
    rounds = 1 if run.toy else 7
    seconds = timing.median(run, lambda: predict(latents, times), rounds)
    captions = len(next(iter(predict.both.values())).states)
    conditioner = timing.median(
        run, lambda: model.conditioner(predict.both, times[:1].expand(captions)), rounds
    )
    run.headline(f"{1e3 * seconds:.0f} ms")
    return {
        "images": len(latents),
        "step_ms": round(1e3 * seconds, 2),
        "conditioner_ms": round(1e3 * conditioner, 2),
    }


@torch.no_grad()
def replayed(run: Run, model: LIDiT) -> dict[str, Any]:
    """The same step recorded once and replayed: the time that is the GPU's alone."""
    predict, latents, times = _predictor(run, model, many=True)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            predict(latents, times)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        predict(latents, times)
    seconds = timing.median(run, graph.replay, 7)
    run.headline(f"{1e3 * seconds:.0f} ms replayed")
    return {"step_ms": round(1e3 * seconds, 2)}
