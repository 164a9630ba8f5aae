"""Part 6: an LLM's blocks between GPU and CPU, and whether an offloaded pipeline draws the same
images.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.embed import random_trunk
from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from benchmarks.gpu.trainer import TOY
from benchmarks.model import build_lidit, lidit_inputs
from lidit.pipeline import LIDiTPipeline

BLOCKS = 6  # of the 30 that prompt states need


def part_6(run: Run) -> None:
    run.attempt("same images", lambda: same_images(run), needs=5)
    run.attempt("moving blocks", lambda: moving(run), needs=8)


def moving(run: Run) -> dict[str, Any]:
    """GB/s of some blocks of an 8B LLM out and in, as `to` moves them and through pinned memory."""
    trunk = random_trunk(
        "tiny" if run.toy else "8b", run.device.type, 1 if run.toy else BLOCKS
    ).layers
    weights = [weight.data for weight in trunk.parameters()]
    gigabytes = sum(weight.nbytes for weight in weights) / 1e9
    found: dict[str, Any] = {"gigabytes": round(gigabytes, 3)}
    found["out"] = gigabytes / timing.wall(run, lambda: trunk.to("cpu"))
    found["in"] = gigabytes / timing.wall(run, lambda: trunk.to(run.device))
    weights = [weight.data for weight in trunk.parameters()]
    hosts: list[torch.Tensor] = []

    def pin() -> None:
        hosts.extend(
            torch.empty(weight.shape, dtype=weight.dtype, pin_memory=run.cuda) for weight in weights
        )

    found["pin_seconds"] = timing.wall(run, pin)

    def out() -> None:
        for host, weight in zip(hosts, weights, strict=True):
            host.copy_(weight, non_blocking=True)

    def back() -> None:
        for host, weight in zip(hosts, weights, strict=True):
            weight.copy_(host, non_blocking=True)

    found["out_pinned"] = gigabytes / timing.wall(run, out)
    found["in_pinned"] = gigabytes / timing.wall(run, back)
    run.headline(
        f"out {found['out']:.1f}, in {found['in']:.1f}, pinned {found['in_pinned']:.1f} GB/s"
    )
    return {name: round(value, 3) for name, value in found.items()}


def same_images(run: Run) -> dict[str, Any]:
    """Latents of one seed with the network on the device, and offloaded: bit by bit."""
    torch.manual_seed(0)
    model = build_lidit(TOY, run.device, torch.bfloat16 if run.cuda else torch.float32)
    lengths = torch.full((2, 2), TOY.caption)
    states = lidit_inputs(TOY, lengths, TOY.caption, torch.device("cpu"), torch.float32)["text"]
    side = TOY.latent
    pipeline = LIDiTPipeline(model, height=side, width=side)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        found: torch.Tensor = pipeline(
            states=states, guidance_scale=1, num_inference_steps=2, seed=1, output_type="latent"
        ).images
        return found

    plain = draw()
    if run.cuda:
        pipeline.enable_model_cpu_offload()
    again = draw()
    run.headline(
        f"images {'the same' if torch.equal(plain.cpu(), again.cpu()) else 'not the same'} "
        "offloaded"
    )
    return {
        "equal": torch.equal(plain.cpu(), again.cpu()),
        "offloaded": str(next(model.parameters()).device),
    }
